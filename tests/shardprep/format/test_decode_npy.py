"""Other readers decode members of both codecs, and hostile ones do no harm."""

from __future__ import annotations

import gc
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
import zstandard

import shardprep
from shardprep import CorruptShardError, decode_npy
from shardprep.format import codecs
from shardprep.format.manifest import CodecInfo

MEL = np.arange(300, dtype=np.float16).reshape(100, 3)
STORED = {
    "mel.npy": codecs.encode(MEL, CodecInfo("none")),
    "mel.npy.zst": codecs.encode(MEL, CodecInfo("zstd", 3, 16)),
}


def saved(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("prefix", ["", ".", "speaker/key."])
def test_both_codecs_by_any_name_that_readers_give(name: str, prefix: str) -> None:
    mel = decode_npy(prefix + name.upper(), STORED[name])
    assert mel is not None
    assert mel.dtype == MEL.dtype
    assert np.array_equal(mel, MEL)


@pytest.mark.parametrize("name", ["cls", "json", "zst", "npz", "mel.npy.gz", "mel.npyx", ""])
def test_members_of_other_names_are_left_to_others(name: str) -> None:
    assert decode_npy(name, b"1") is None


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("mel.npy", STORED["mel.npy"][:-1]),
        ("mel.npy", b""),
        ("mel.npy", STORED["mel.npy.zst"]),
        ("mel.npy.zst", STORED["mel.npy.zst"][:200]),
        ("mel.npy.zst", STORED["mel.npy.zst"].replace(b"\x28\xb5", b"\x28\xb4", 1)),
        ("mel.npy", saved(np.array([{"a": 1}], dtype=object))),
        ("mel.npy", pickle.dumps({"a": 1})),
        ("mel.npy.zst", zstandard.compress(saved(np.zeros((1 << 25, 1), np.float32)))),
    ],
    ids=["cut", "empty", "other codec", "cut zstd", "flipped", "objects", "pickle", "bomb"],
)
def test_what_is_no_matrix_is_an_error_that_names_the_member(name: str, data: bytes) -> None:
    with pytest.raises(CorruptShardError, match=f"^{name}: the member cannot be decoded: "):
        decode_npy(name, data)


# webdataset leaves closing its files to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("kind", [("float16", "none"), ("uint8", "zstd")], ids="-".join)
def test_webdataset_takes_it_as_a_handler(
    edge_sets: dict[tuple[str, str], Path], kind: tuple[str, str]
) -> None:
    shards = edge_sets[kind]
    split = shardprep.open_shards(shards)["train"]
    urls = [str(path) for path in sorted(shards.glob("train-*.tar"))]
    pipeline = webdataset.WebDataset(urls, shardshuffle=False).decode(decode_npy)
    found = list(pipeline)
    gc.collect()
    assert [sample["__key__"] for sample in found] == split.keys.tolist()
    for number, sample in enumerate(found):
        mel = next(value for name, value in sample.items() if name.startswith("mel."))
        assert np.array_equal(mel, split.read_stored(number))
        if kind[0] == "uint8":
            mel = mel.astype("float32") * sample["json"]["step"] + sample["json"]["minimum"]
            assert np.array_equal(mel, split.read(number))
        assert sample["cls"] == split.labels[number]
