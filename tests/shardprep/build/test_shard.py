"""A shard is a plain tar that other readers open; equal inputs give equal bytes."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from numpy.typing import NDArray

from shardprep import BuildReport, SourceError, open_shards
from shardprep.build.plan import ShardPlan, ShardTask, plan_shards
from shardprep.build.shard import write_shard
from shardprep.format.manifest import CodecInfo
from shardprep.source import reader
from shardprep.source.dataset import scan_dataset
from tests.shardprep.conftest import as_read

SETS = [(dtype, codec) for dtype in ("float16", "float32", "uint8") for codec in ("none", "zstd")]


def plain(data: bytes, suffix: str) -> NDArray[Any]:
    """Decode a mel member without shardprep."""
    if suffix == "zst":
        reader = zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True)
        data = reader.read()
    matrix: NDArray[Any] = np.load(io.BytesIO(data))
    return matrix


@pytest.fixture
def task(make_dataset: Callable[..., Path]) -> ShardTask:
    source = scan_dataset(make_dataset(speakers=2, utterances=5))
    plan = plan_shards(source, val_fraction=0, samples_per_shard=99, seed=0)["train"][0]
    return ShardTask(plan, source.reader, 40, "float16", CodecInfo("none"), skip=False)


@pytest.mark.parametrize("kind", SETS, ids="-".join)
def test_tar_command_lists_the_members_of_each_sample_side_by_side(
    edge_sets: dict[tuple[str, str], Path], kind: tuple[str, str]
) -> None:
    shard_set = open_shards(edge_sets[kind])
    mel = ".mel.npy.zst" if kind[1] == "zstd" else ".mel.npy"
    for split in shard_set.values():
        listed: list[str] = []
        for path in sorted(shard_set.path.glob(f"{split.name}-*.tar")):
            done = subprocess.run(["tar", "-tf", path], capture_output=True, text=True, check=True)
            listed += done.stdout.splitlines()
        suffixes = [mel, ".cls", ".json"]
        assert listed == [key + suffix for key in split.keys for suffix in suffixes]


@pytest.mark.parametrize("kind", SETS, ids="-".join)
def test_tarfile_reads_the_same_as_the_split(
    edge_sets: dict[tuple[str, str], Path], kind: tuple[str, str]
) -> None:
    shard_set = open_shards(edge_sets[kind])
    for split in shard_set.values():
        members: dict[str, bytes] = {}
        for path in shard_set.path.glob(f"{split.name}-*.tar"):
            with tarfile.open(path) as tar:
                for member in tar:
                    file = tar.extractfile(member)
                    assert file is not None
                    members[member.name] = file.read()
        for index, key in enumerate(split.keys):
            name = next(name for name in members if name.startswith(f"{key}.mel."))
            matrix = plain(members[name], name.rpartition(".")[2])
            assert matrix.dtype == kind[0]
            np.testing.assert_array_equal(matrix, split.read_stored(index))
            about = json.loads(members[f"{key}.json"])
            if kind[0] == "uint8":
                # What any other reader does.
                mel = matrix.astype("float32") * about["step"] + about["minimum"]
                assert mel.dtype == np.float32
                assert mel.tobytes() == split.read(index).tobytes()
            assert about["frames"] == len(matrix) == split.frames[index]
            assert about["source"] == f"{key}.pt"
            label = int(members[f"{key}.cls"])
            assert label == split.labels[index]
            assert about["speaker"] == ("" if label < 0 else shard_set.speakers[label])
            types = {name: type(value) for name, value in about.items()}
            scale = {"minimum": float, "step": float} if kind[0] == "uint8" else {}
            assert types == {"frames": int, "source": str, "speaker": str, **scale}


@pytest.mark.parametrize("kind", SETS, ids="-".join)
def test_matrices_are_those_of_the_source(
    edge_sets: dict[tuple[str, str], Path], edge_source: Path, kind: tuple[str, str]
) -> None:
    for split in open_shards(edge_sets[kind]).values():
        for index, key in enumerate(split.keys):
            original = torch.load(edge_source / f"{key}.pt").numpy()
            np.testing.assert_array_equal(split.read(index), as_read(original, kind[0]))


def test_members_have_no_trace_of_time_or_user(edge_set: Path) -> None:
    with tarfile.open(edge_set / "train-000000.tar") as tar:
        traits = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.type) for m in tar}
    assert traits == {(0, 0, 0, "", "", 0o644, tarfile.REGTYPE)}


@pytest.mark.parametrize("kind", SETS, ids="-".join)
def test_bytes_are_those_that_tarfile_writes(
    edge_sets: dict[tuple[str, str], Path], kind: tuple[str, str]
) -> None:
    for path in edge_sets[kind].glob("*.tar"):
        again = io.BytesIO()
        with (
            tarfile.open(path) as tar,
            tarfile.open(fileobj=again, mode="w", format=tarfile.USTAR_FORMAT) as copy,
        ):
            for member in tar:
                plain_member = tarfile.TarInfo(member.name)
                plain_member.size = member.size
                copy.addfile(plain_member, tar.extractfile(member))
        assert again.getvalue() == path.read_bytes()


def test_every_file_is_fetched_once_before_it_is_read_and_not_far_ahead(
    task: ShardTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    load = reader.load_features

    def loading(path: Path, *expected: Any, **options: Any) -> Any:
        events.append(("load", str(path)))
        return load(path, *expected, **options)

    monkeypatch.setattr(reader, "_FILES_AHEAD", 3)
    monkeypatch.setattr(reader, "fetch", lambda path: events.append(("fetch", path)))
    monkeypatch.setattr(reader, "load_features", loading)
    write_shard(task, io.BytesIO())
    paths = [str(task.reader.root / u.path) for u in task.plan.utterances]
    for kind in ("fetch", "load"):
        assert [path for what, path in events if what == kind] == paths
    for number, path in enumerate(paths):
        assert events.index(("fetch", path)) < events.index(("load", path))
        if number >= 3:
            assert events.index(("load", paths[number - 3])) < events.index(("fetch", path))


def test_index_rows_point_at_the_payloads(edge_set: Path) -> None:
    split = open_shards(edge_set)["train"]
    assert len(set(split.locations["shard"])) > 2
    for row in split.locations:
        data = (edge_set / f"train-{row['shard']:06d}.tar").read_bytes()
        payload = data[row["offset"] : row["offset"] + row["nbytes"]]
        assert zlib.crc32(payload) == row["crc32"]
        assert len(np.load(io.BytesIO(payload))) == row["frames"]
        assert row["offset"] % 512 == 0


def test_record_describes_the_shard(task: ShardTask) -> None:
    file, read = io.BytesIO(), [0]
    record = write_shard(task, file, read.append)
    again = io.BytesIO()
    assert write_shard(task, again) == record
    assert again.getvalue() == file.getvalue()
    assert record.info.bytes == len(file.getvalue())
    assert record.info.bytes % 10_240 == 0
    assert record.info.samples == len(record.rows) == 10
    assert record.info.frames == sum(row.frames for row in record.rows)
    assert sum(read) == record.source_bytes == sum(u.nbytes for u in task.plan.utterances)


def test_inputs_change_with_whatever_decides_the_bytes(task: ShardTask) -> None:
    first, *rest = task.plan.utterances

    def with_plan(*utterances: Any) -> dict[str, Any]:
        return {"plan": ShardPlan(task.plan.file, "train", tuple(utterances))}

    changes: list[dict[str, Any]] = [
        {"dtype": "float32"},
        {"dtype": "uint8"},
        {"codec": CodecInfo("zstd", 3, 64)},
        {"codec": CodecInfo("zstd", 4, 64)},
        {"n_mels": 41},
        {"skip": True},
        with_plan(*rest, first),
        with_plan(*rest),
        with_plan(first._replace(label=9), *rest),
        with_plan(first._replace(nbytes=first.nbytes + 1), *rest),
        with_plan(first._replace(version=first.version + 1), *rest),
    ]
    inputs = {ShardTask(**{**vars(task), **change}).inputs for change in changes}
    assert len(inputs | {task.inputs}) == len(changes) + 1


def test_faulty_utterance_raises_or_is_left_out_as_the_task_says(task: ShardTask) -> None:
    bad = task.plan.utterances[3]
    (task.reader.root / bad.path).write_bytes(b"garbage")
    with pytest.raises(SourceError, match=bad.path):
        write_shard(task, io.BytesIO())
    file = io.BytesIO()
    record = write_shard(ShardTask(**{**vars(task), "skip": True}), file)
    assert [reject.key for reject in record.rejects] == [bad.key]
    assert bad.key not in {row.key for row in record.rows}
    file.seek(0)
    with tarfile.open(fileobj=file) as tar:
        assert not any(name.startswith(bad.key) for name in tar.getnames())
        assert len(tar.getnames()) == 3 * 9


@pytest.mark.parametrize("key", ["k" * 88, "é" * 44, "folder/sub/" + "n" * 70])
def test_longest_and_nested_keys_are_read_back(
    source_of: Callable[..., Path], build: Callable[..., BuildReport], tmp_path: Path, key: str
) -> None:
    root = source_of({"ann": [9]})
    target = root / f"{key}.pt"
    target.parent.mkdir(parents=True, exist_ok=True)
    (root / "ann-000.pt").rename(target)
    text = (root / "metadata.json").read_text().replace("ann-000", key)
    (root / "metadata.json").write_text(text)
    build(root, tmp_path / "shards", codec="zstd")
    split = open_shards(tmp_path / "shards")["train"]
    assert list(split.keys) == [key]
    with tarfile.open(tmp_path / "shards" / "train-000000.tar") as tar:
        names = tar.getnames()
    assert names == [f"{key}.mel.npy.zst", f"{key}.cls", f"{key}.json"]


def test_values_at_the_edge_of_float16_are_kept(
    source_of: Callable[..., Path], build: Callable[..., BuildReport], tmp_path: Path
) -> None:
    root = source_of({"ann": [2]})
    edge = torch.tensor([[65504.0, -65504.0, 65519.0, 6e-8, 0.0, -0.0, 1.0], [1.0] * 7])
    torch.save(edge, root / "ann-000.pt")
    build(root, tmp_path / "shards")
    mel = open_shards(tmp_path / "shards")["train"].read(0)
    np.testing.assert_array_equal(mel, edge.numpy().astype(np.float16))
    torch.save(edge * 1.001, root / "ann-000.pt")
    with pytest.raises(SourceError, match="float16"):
        build(root, tmp_path / "shards", overwrite=True)
