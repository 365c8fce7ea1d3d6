"""Sets of element type uint8: equal bytes may stand for other values, and the scale says which."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import shardprep
from shardprep import BuildError, BuildReport, CorruptShardError, SourceError, open_shards
from shardprep.build.options import BuildOptions
from shardprep.build.plan import ShardTask, shard_tasks
from shardprep.build.shard import ShardRecord, write_shard
from shardprep.build.work import is_of
from shardprep.format.quantised import Scale, is_scale, scale_of
from shardprep.read.webdataset import decode_sample
from shardprep.source.scan import scan_source
from tests.shardprep.conftest import as_read

Build = Callable[..., BuildReport]
Contents = Callable[[Path], dict[str, str]]
LENGTHS = {"ann": (30, 31, 40), "bob": (52, 53)}


def shift(source: Path, name: str = "ann-001") -> None:
    """Add 1 to every value of an utterance, all multiples of its step: its bytes stay."""
    path = source / f"{name}.pt"
    mel = torch.load(path)
    before = torch.from_numpy(np.arange(mel.numel(), dtype=np.float32).reshape(mel.shape) % 256)
    torch.save(before / 4 if torch.equal(mel, before / 4 - 7) else before / 4 - 7, path)


@pytest.fixture
def source(source_of: Callable[..., Path]) -> Path:
    root = source_of(LENGTHS, (9, 60))
    shift(root)
    return root


@pytest.fixture(params=["none", "zstd"])
def codec(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def options(codec: str) -> dict[str, Any]:
    return {"dtype": "uint8", "codec": codec, "samples_per_shard": 3, "val_fraction": 0}


def test_values_that_differ_by_a_constant_have_equal_bytes(
    source: Path, tmp_path: Path, build: Build, codec: str
) -> None:
    """What the tests below rest on."""
    build(source, tmp_path / "a", **options(codec))
    shift(source)
    build(source, tmp_path / "b", **options(codec))
    a, b = (open_shards(tmp_path / name)["train"] for name in "ab")
    other = np.flatnonzero(a.locations != b.locations)
    assert a.keys[other].tolist() == ["ann-001"]
    fields = [name for name in a.locations.dtype.names if name != "minimum"]
    assert np.array_equal(a.locations[fields], b.locations[fields])
    assert b.read(other[0])[0, 0] - a.read(other[0])[0, 0] == 7


def test_a_build_finds_that_only_the_scale_has_changed(
    source: Path, tmp_path: Path, build: Build, codec: str
) -> None:
    build(source, tmp_path / "s", **options(codec))
    assert build(source, tmp_path / "s", **options(codec)).up_to_date
    shift(source)
    with pytest.raises(BuildError, match=r"ann-001\.pt"):
        build(source, tmp_path / "s", **options(codec))
    with pytest.raises(BuildError, match=r"dtype uint8, not float16"):
        build(source, tmp_path / "s", **{**options(codec), "dtype": "float16"})


def test_verify_against_the_source_finds_it(
    source: Path, tmp_path: Path, build: Build, codec: str
) -> None:
    build(source, tmp_path / "s", **options(codec))
    assert shardprep.verify_shards(tmp_path / "s", deep=True, against=source).intact
    shift(source)
    (fault,) = shardprep.verify_shards(tmp_path / "s", against=source).faults
    assert (fault.key, fault.what) == ("ann-001", "differs from the source file ann-001.pt")


def test_a_repair_does_not_take_bytes_of_another_scale(
    source: Path, tmp_path: Path, build: Build, contents: Contents, codec: str
) -> None:
    build(source, tmp_path / "s", **options(codec))
    whole = contents(tmp_path / "s")
    split = open_shards(tmp_path / "s")["train"]
    row = split.locations[split.keys.tolist().index("ann-001")]
    path = tmp_path / "s" / f"train-{row['shard']:06d}.tar"
    data = bytearray(path.read_bytes())
    data[int(row["offset"]) + int(row["nbytes"]) // 2] ^= 16
    path.write_bytes(data)
    shift(source)
    report = shardprep.repair_shards(tmp_path / "s", source=source, workers=1)
    assert not report.intact
    assert any("is not the file that the set was built from" in note for note in report.notes)
    shift(source)
    assert shardprep.repair_shards(tmp_path / "s", source=source, workers=1).intact
    assert contents(tmp_path / "s") == whole


def test_a_writer_finds_it_in_a_finished_set(tmp_path: Path, codec: str) -> None:
    mel = np.arange(512, dtype=np.float32).reshape(64, 8) % 256

    def write(matrix: np.ndarray) -> BuildReport:
        with shardprep.ShardWriter(
            tmp_path / "s",
            8,
            dtype="uint8",
            codec=codec,
            workers=1,  # type: ignore[arg-type]
        ) as writer:
            writer.add("a", matrix, "ann")
        return writer.close()

    write(mel)
    assert write(mel).up_to_date
    assert np.array_equal(open_shards(tmp_path / "s")["train"].read(0), mel)
    with pytest.raises(BuildError, match="another matrix of this utterance"):
        write(mel + 7)
    with pytest.raises(SourceError, match='range of uint8; use dtype="float32"'):
        write(np.where(mel == 9, np.float32(3e38), mel))


def test_bytes_do_not_depend_on_the_number_of_workers(
    source: Path, tmp_path: Path, build: Build, contents: Contents
) -> None:
    for workers in (1, 2):
        build(source, tmp_path / str(workers), **options("zstd"), workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_what_is_appended_has_the_type_and_the_values_of_the_set(
    source: Path, tmp_path: Path, build: Build
) -> None:
    build(source, tmp_path / "s", **options("none"))
    rng = np.random.default_rng(3)
    metadata = json.loads((source / "metadata.json").read_text())
    for name in ("eve-000", "eve-001"):
        mel = rng.normal(-5, 4, (45, 7)).astype(np.float32)
        torch.save(torch.from_numpy(mel), source / f"{name}.pt")
        entry = {"feature_path": f"{name}.pt", "mel_len": 45}
        metadata["speakers"].setdefault("eve", []).append(entry)
    (source / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(BuildError, match="dtype uint8, not float32"):
        shardprep.append_shards(source, tmp_path / "s", BuildOptions(dtype="float32"))
    shardprep.append_shards(source, tmp_path / "s", BuildOptions(workers=1))
    assert shardprep.verify_shards(tmp_path / "s", deep=True, against=source).intact
    split = open_shards(tmp_path / "s")["train"]
    assert sorted(split.keys[-2:]) == ["eve-000", "eve-001"]
    for index, key in enumerate(split.keys):
        original = torch.load(source / f"{key}.pt").numpy()
        assert np.array_equal(split.read(index), as_read(original, "uint8"))


def test_several_sets_are_read_as_one(source: Path, tmp_path: Path, build: Build) -> None:
    build(source, tmp_path / "a", **options("none"))
    shift(source)
    build(source, tmp_path / "b", **options("none"))
    both = open_shards([tmp_path / "a", tmp_path / "b"])["train"]
    parts = [open_shards(tmp_path / name)["train"] for name in "ab"]
    alone = [part.read(i) for part in parts for i in range(len(part))]
    for index, mel in enumerate(alone):
        assert np.array_equal(both.read(index), mel)
    starts = np.zeros(len(both), int)
    expected = np.stack([mel[:30] for mel in alone])
    assert np.array_equal(both.segments(np.arange(len(both)), starts, 30), expected)


def test_values_that_do_not_fit_are_rejected_in_words(
    source: Path, tmp_path: Path, build: Build
) -> None:
    path = source / "bob-000.pt"
    mel = torch.load(path)
    mel[0, 0], mel[1, 0] = 3e38, -3e38
    torch.save(mel, path)
    with pytest.raises(SourceError, match=r"bob-000\.pt.*use --dtype float32"):
        build(source, tmp_path / "s", **options("none"))
    build(source, tmp_path / "s", **options("none"), on_error="skip")
    (line,) = open_shards(tmp_path / "s").rejects
    assert (line.key, "beyond the range of uint8" in line.reason) == ("bob-000", True)


def test_utterances_of_usual_lengths_take_half_the_room_of_float16(
    source_of: Callable[..., Path], tmp_path: Path, build: Build
) -> None:
    # Its median is 540 frames of 40 bins: as many numbers as 3,086 frames of 7.
    source = source_of({"ann": (3086,) * 20})
    for dtype in ("float16", "uint8"):
        build(source, tmp_path / dtype, dtype=dtype, val_fraction=0)
    sizes = [
        sum(path.stat().st_size for path in (tmp_path / dtype).glob("*.tar"))
        for dtype in ("uint8", "float16")
    ]
    assert sizes[0] / sizes[1] < 0.54


@pytest.fixture
def task(source: Path) -> ShardTask:
    return shard_tasks(scan_source(source), BuildOptions(dtype="uint8"))[0]


def test_the_record_of_an_unfinished_build_keeps_the_scales(task: ShardTask) -> None:
    record = write_shard(task, io.BytesIO())
    again = msgspec.json.decode(msgspec.json.encode(record), type=ShardRecord)
    assert again == record
    assert is_of(again, task)
    for scale in (None, Scale(0.0, -1.0), Scale(3e38, 1.0), Scale(1e300, 1.0)):
        first = msgspec.structs.replace(record.rows[0], scale=scale)
        assert not is_of(msgspec.structs.replace(record, rows=(first, *record.rows[1:])), task)


def altered(shards: Path, key: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the JSON of an utterance, whose checksum nothing but the manifest has."""
    for path in shards.glob("train-*.tar"):
        with tarfile.open(path) as tar:
            members = [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for member, data in members:
                if member.name == f"{key}.json":
                    about = json.loads(data)
                    change(about)
                    data = json.dumps(about).encode()
                    member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize(
    "change",
    [
        lambda about: about.update(minimum=about["minimum"] + 1),
        lambda about: about.update(step=0.5),
        lambda about: about.pop("step"),
    ],
    ids=["minimum", "step", "none"],
)
def test_stream_compares_the_scale_with_that_of_the_index(
    source: Path, tmp_path: Path, build: Build, change: Callable[[dict[str, Any]], Any]
) -> None:
    build(source, tmp_path / "s", **options("none"))
    altered(tmp_path / "s", "ann-001", change)
    with pytest.raises(CorruptShardError, match="ann-001: its JSON does not have the minimum"):
        list(shardprep.stream(tmp_path / "s"))


def test_a_tar_alone_is_widened_by_its_own_json(source: Path, tmp_path: Path, build: Build) -> None:
    build(source, tmp_path / "s", **options("zstd"))
    split = open_shards(tmp_path / "s")["train"]
    shutil.move(tmp_path / "s" / "train-000000.tar", tmp_path / "x.tar")
    found = list(shardprep.stream(str(tmp_path / "x.tar")))
    assert found
    for index, sample in enumerate(found):
        assert sample["__key__"] == split.keys[index]
        original = torch.load(source / f"{sample['__key__']}.pt").numpy()
        assert np.array_equal(sample["mel"], as_read(original, "uint8"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@given(st.fixed_dictionaries({}, optional={"minimum": JSON, "step": JSON}) | JSON)
@example({"minimum": 10**400, "step": 1})
@example({"minimum": 0.0, "step": True})
@example({"minimum": 1e300, "step": 0})
@settings(max_examples=50)
def test_whatever_a_json_states_is_a_scale_or_refused(about: Any) -> None:
    try:
        scale = scale_of(about)
    except ValueError:
        pass
    else:
        assert is_scale(scale)
        stated = [np.float32(about[name]) for name in ("minimum", "step")]
        assert [float(value) for value in stated] == list(scale)
    data = io.BytesIO()
    np.save(data, np.zeros((2, 3), np.uint8))
    sample = {"__key__": "a", "mel.npy": data.getvalue(), "json": json.dumps(about).encode()}
    message = "a: cannot be decoded"
    try:
        assert np.isfinite(decode_sample(sample)["mel"]).all()
    except CorruptShardError as error:
        message = str(error)
    assert "a: cannot be decoded" in message


def test_the_json_states_the_scale_to_the_last_bit(
    source: Path, tmp_path: Path, build: Build
) -> None:
    build(source, tmp_path / "s", **options("none"))
    split = open_shards(tmp_path / "s")["train"]
    with tarfile.open(tmp_path / "s" / "train-000000.tar") as tar:
        for index in np.flatnonzero(split.locations["shard"] == 0):
            about = json.loads(tar.extractfile(f"{split.keys[index]}.json").read())  # type: ignore[union-attr]
            row = split.locations[index]
            assert (about["minimum"], about["step"]) == (row["minimum"], row["step"])
