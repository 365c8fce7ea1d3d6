"""webdataset, by itself and through `stream`, reads what `Split.read` reads."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
import zstandard
from torch.utils.data import DataLoader

import shardprep
from shardprep import BuildReport, CorruptShardError, FormatError, Split, open_shards
from shardprep.read.webdataset import decode_sample

DamagedSplit = Callable[..., tuple[Split, list[int]]]
SETS = [(dtype, codec) for dtype in ("float16", "float32", "uint8") for codec in ("none", "zstd")]


def assert_same(samples: list[dict[str, Any]], split: Split, speakers: tuple[str, ...]) -> None:
    assert [sample["__key__"] for sample in samples] == list(split.keys)
    for index, sample in enumerate(samples):
        assert sample["mel"].dtype == split.dtype
        np.testing.assert_array_equal(sample["mel"], split.read(index))
        label = int(split.labels[index])
        assert sample["label"] == label
        assert sample["speaker"] == (None if label < 0 else speakers[label])
        assert sample["frames"] == split.frames[index]


@pytest.mark.parametrize("kind", SETS, ids="-".join)
def test_stream_gives_every_split_in_the_order_of_the_index(
    edge_sets: dict[tuple[str, str], Path], kind: tuple[str, str]
) -> None:
    shard_set = open_shards(edge_sets[kind])
    for name, split in shard_set.items():
        assert_same(list(shardprep.stream(shard_set.path, name)), split, shard_set.speakers)


# webdataset leaves it to the garbage collector to close its files.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_webdataset_alone_reads_the_shards(
    edge_sets: dict[tuple[str, str], Path], codec: str
) -> None:
    shard_set = open_shards(edge_sets["float16", codec])
    split = shard_set["train"]
    urls = [str(path) for path in sorted(shard_set.path.glob("train-*.tar"))]
    seen = 0
    for index, sample in enumerate(wds.WebDataset(urls, shardshuffle=False)):
        payload = sample["mel.npy" if codec == "none" else "mel.npy.zst"]
        if codec == "zstd":
            reader = zstandard.ZstdDecompressor().stream_reader(payload, read_across_frames=True)
            payload = reader.read()
        np.testing.assert_array_equal(np.load(io.BytesIO(payload)), split.read(index))
        assert sample["__key__"] == split.keys[index]
        assert int(sample["cls"]) == split.labels[index]
        assert json.loads(sample["json"])["frames"] == split.frames[index]
        seen += 1
    assert seen == len(split)


def test_patterns_lists_and_pipes_are_sources_too(edge_set: Path) -> None:
    expected = list(open_shards(edge_set)["test"].keys)
    (name,) = [path.name for path in edge_set.glob("test-*.tar")]
    assert name == "test-000000.tar"
    for source in (
        f"{edge_set}/test-{{000000..000000}}.tar",
        [f"{edge_set}/{name}"],
        f"pipe:cat {edge_set}/{name}",
    ):
        assert [sample["__key__"] for sample in shardprep.stream(source)] == expected


def test_of_several_sources_each_is_a_tar(edge_set: Path) -> None:
    tars = sorted(edge_set.glob("train-*.tar"))
    keys = [sample["__key__"] for sample in shardprep.stream(tars)]
    assert keys == open_shards(edge_set)["train"].keys.tolist()
    with pytest.raises(FormatError, match="is a folder, and stream takes one folder, or tars"):
        shardprep.stream([edge_set, edge_set])


def test_shuffle_is_seeded_and_loses_nothing(edge_set: Path) -> None:
    def order(seed: int) -> list[str]:
        return [s["__key__"] for s in shardprep.stream(edge_set, shuffle=16, seed=seed)]

    keys = list(open_shards(edge_set)["train"].keys)
    assert order(0) == order(0)
    assert len({tuple(order(0)), tuple(order(1)), tuple(keys)}) == 3
    assert sorted(order(0)) == sorted(keys)


def test_each_iteration_has_another_shuffle(edge_set: Path) -> None:
    pipeline = shardprep.stream(edge_set, shuffle=16)
    epochs = [[sample["__key__"] for sample in pipeline] for _ in range(3)]
    assert len(set(map(tuple, epochs))) == 3
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("persistent", [False, True])
def test_each_iteration_of_workers_has_another_shuffle(edge_set: Path, persistent: bool) -> None:
    def orders() -> list[list[str]]:
        pipeline = shardprep.stream(edge_set, shuffle=16)
        batches = DataLoader(
            pipeline,
            batch_size=None,
            num_workers=2,
            multiprocessing_context="fork",
            persistent_workers=persistent,
        )
        return [[sample["__key__"] for sample in batches] for _ in range(3)]

    epochs = orders()
    assert len(set(map(tuple, epochs))) == 3
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    # The seed decides on them, not how the workers came about.
    assert orders() == epochs


@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize("shuffle", [0, 10])
def test_a_flipped_bit_is_named(damaged_split: DamagedSplit, codec: str, shuffle: int) -> None:
    split, (bad,) = damaged_split([5], codec)
    folder = Path(split.damaged(bad).file or "").parent
    with pytest.raises(CorruptShardError, match="do not match their crc32") as caught:
        list(shardprep.stream(folder, shuffle=shuffle))
    assert caught.value.key == str(split.keys[bad])
    assert caught.value.file == split.damaged(bad).file


def test_an_utterance_that_is_missing_in_a_shard_is_noticed(damaged_split: DamagedSplit) -> None:
    split, _ = damaged_split([])
    path = Path(split.damaged(3).file or "")
    with tarfile.open(path) as tar:
        contents = [(member, tar.extractfile(member)) for member in tar]
        kept = [(m, f.read()) for m, f in contents if f and m.name.split(".")[0] != split.keys[3]]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for member, data in kept:
            tar.addfile(member, io.BytesIO(data))
    with pytest.raises(CorruptShardError, match="lacks 1 of the utterances in its index"):
        list(shardprep.stream(path.parent))
    # Shards that the user did not select are not missing.
    assert len(list(itertools.islice(shardprep.stream(path.parent), 2))) == 2


def test_shards_can_come_more_than_once(edge_set: Path) -> None:
    samples = list(shardprep.stream(edge_set, "val").repeat(3))
    assert len(samples) == 3 * len(open_shards(edge_set)["val"])


def test_unknown_split_is_refused(edge_set: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no split 'dev'; the set has train, val, test"):
        shardprep.stream(edge_set, "dev")
    with pytest.raises(FormatError, match=r"no manifest\.json"):
        shardprep.stream(tmp_path)


@pytest.mark.parametrize(
    "sample",
    [
        {"json": b"{}"},
        {"mel.npy": b"garbage"},
        {"mel.npy": b""},
        {"mel.npy.zst": b"garbage"},
        {"mel.npy": b"ok", "cls": b"seven"},
        {"mel.npy": b"ok", "json": b"{"},
        {"mel.npy": b"ok", "json": b"[]"},
    ],
    ids=lambda sample: repr(sample),
)
def test_sample_that_cannot_be_decoded_is_named(sample: dict[str, bytes]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((2, 7), np.float16))
    filled = {name: buffer.getvalue() if v == b"ok" else v for name, v in sample.items()}
    with pytest.raises(CorruptShardError, match=r"^a\.tar: k: "):
        decode_sample({"__key__": "k", "__url__": "a.tar", **filled})


def test_foreign_tar_without_label_or_json_streams(tmp_path: Path) -> None:
    mel = np.arange(21, dtype=np.float32).reshape(3, 7)
    buffer = io.BytesIO()
    np.save(buffer, mel)
    with tarfile.open(tmp_path / "foreign.tar", "w") as tar:
        member = tarfile.TarInfo("one.mel.npy")
        member.size = len(buffer.getvalue())
        buffer.seek(0)
        tar.addfile(member, buffer)
    (sample,) = shardprep.stream(str(tmp_path / "foreign.tar"))
    np.testing.assert_array_equal(sample.pop("mel"), mel)
    assert sample == {"__key__": "one", "label": -1, "speaker": None, "frames": 3}


def test_hugging_face_datasets_reads_the_shards(
    make_dataset: Callable[..., Path],
    build: Callable[..., BuildReport],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    build(make_dataset(), tmp_path / "shards")
    split = open_shards(tmp_path / "shards")["train"]
    loaded = datasets.load_dataset(
        "webdataset",
        data_files=str(tmp_path / "shards" / "train-*.tar"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert list(loaded["__key__"]) == list(split.keys)
    assert [int(label) for label in loaded["cls"]] == list(split.labels)
    for index in range(len(split)):
        np.testing.assert_array_equal(np.asarray(loaded[index]["mel.npy"]), split.read(index))
    shutil.rmtree(tmp_path / "cache")
