"""A manifest that no build would write is refused, field by field, and a valid one never is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from shardprep import BuildError, BuildOptions, FormatError, SourceError, build_shards
from shardprep.format.limits import json_values, most_matrix_bytes
from shardprep.format.manifest import (
    CodecInfo,
    Manifest,
    decode_manifest,
    encode_manifest,
    manifest_faults,
)
from shardprep.read.manifest_file import load_manifest

SHA = "0" * 64


def forged(manifest: Manifest, edit: Callable[[Any], Any]) -> bytes:
    """The bytes of an edited manifest, with the right fingerprint."""
    content = msgspec.to_builtins(manifest)
    edit(content)
    return encode_manifest(msgspec.convert(content, Manifest))


def split(**values: Any) -> Callable[[Any], Any]:
    return lambda content: content["splits"]["train"].update(values)


def shard(**values: Any) -> Callable[[Any], Any]:
    return lambda content: content["splits"]["train"]["shards"][0].update(values)


def codec(**values: Any) -> Callable[[Any], Any]:
    return lambda content: content.update(codec=values)


FAULTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no mels": (lambda content: content.update(n_mels=0), "n_mels: is 0, expected 1 to 4096"),
    "too many mels": (lambda content: content.update(n_mels=4097), "n_mels: is 4097"),
    "none with level": (codec(name="none", level=3), "codec: has settings"),
    "zstd without level": (codec(name="zstd", chunk_frames=64), "codec.level: is None"),
    "zstd level 23": (codec(name="zstd", level=23, chunk_frames=64), "codec.level: is 23"),
    "zstd without chunks": (codec(name="zstd", level=3), "chunk_frames: is None"),
    "small chunks": (codec(name="zstd", level=3, chunk_frames=15), "chunk_frames: is 15"),
    "large chunks": (codec(name="zstd", level=3, chunk_frames=80_000), "chunk_frames: is 80000"),
    "split of another name": (
        lambda content: content["splits"].update({"a b": content["splits"].pop("train")}),
        "is not a valid name of a split",
    ),
    "index of another split": (
        lambda content: content["splits"]["train"]["index"].update(file="split=val.index.npy"),
        "has an index of the name",
    ),
    "shard of another split": (shard(file="val-000000.tar"), "a shard of another name than train"),
    "shard twice": (
        lambda content: content["splits"]["train"]["shards"][1].update(
            content["splits"]["train"]["shards"][0]
        ),
        "lists a shard twice",
    ),
    "negative bytes": (shard(bytes=-1), "impossible size"),
    "all disks there are": (shard(bytes=2**60), "impossible size"),
    "no sha256": (shard(sha256="x"), "impossible size or sha256"),
    "samples": (split(samples=10**6), "samples that are not the sum"),
    "frames": (shard(frames=0), "frames that are not the sum"),
    "negative samples": (
        lambda content: [shard(samples=-2)(content), split(samples=0)(content)],
        "samples that are not",
    ),
    "rejects of another name": (
        lambda content: content.update(rejects={"file": "a.txt", "bytes": 1, "sha256": SHA}),
        "rejects: is not an entry",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_of_a_field_is_named(edge_set: Path, name: str) -> None:
    data = forged(load_manifest(edge_set), FAULTS[name][0])
    with pytest.raises(FormatError, match=FAULTS[name][1]):
        decode_manifest(data, Path("manifest.json"))


def test_valid_manifests_have_no_fault(edge_sets: dict[tuple[str, str], Path]) -> None:
    for folder in edge_sets.values():
        assert list(manifest_faults(load_manifest(folder))) == []


def test_widest_mels_fit_the_limit_of_a_chunk(tmp_path: Path) -> None:
    torch.save(torch.randn(70, 4096), tmp_path / "a.pt")
    listed = {"ann": [{"feature_path": "a.pt", "mel_len": 70}]}
    (tmp_path / "metadata.json").write_text(json.dumps({"n_mels": 4096, "speakers": listed}))
    options = BuildOptions(codec="zstd", dtype="float32", workers=1)
    build_shards(tmp_path, tmp_path / "shards", options)
    assert load_manifest(tmp_path / "shards").codec == CodecInfo("zstd", 3, 64)


@pytest.mark.parametrize("content", [1, [], [1, 2, [3]], {"a": 1, "b": [{}, {}]}, "text"])
def test_json_values_is_never_too_low(content: Any) -> None:
    def count(value: Any) -> int:
        inner = value.values() if isinstance(value, dict) else value
        return 1 + sum(map(count, inner)) if isinstance(value, list | dict) else 1

    assert json_values(json.dumps(content).encode()) >= count(content)


def test_matrix_that_shrinks_more_than_readers_accept_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardprep.format.limits.SMALL_MATRIX_BYTES", 1000)
    torch.save(torch.zeros(5000, 40), tmp_path / "a.pt")
    listed = {"ann": [{"feature_path": "a.pt", "mel_len": 5000}]}
    (tmp_path / "metadata.json").write_text(json.dumps({"n_mels": 40, "speakers": listed}))
    build_shards(tmp_path, tmp_path / "plain", BuildOptions(workers=1))
    with pytest.raises(SourceError, match="shrinks from 400000 to .*; use --codec none"):
        build_shards(tmp_path, tmp_path / "zstd", BuildOptions(codec="zstd", workers=1))


def test_limit_of_a_matrix_is_a_number_or_a_multiple_of_the_stored_bytes() -> None:
    assert most_matrix_bytes(0) == 64 << 20
    assert most_matrix_bytes(1 << 20) == 64 << 20
    assert most_matrix_bytes(2 << 20) == 128 << 20
    assert np.iinfo(np.int64).max > most_matrix_bytes(2**32)


def test_build_never_writes_a_manifest_that_readers_refuse(
    edge_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardprep.build.writer.MAX_MANIFEST_VALUES", 150)
    build_shards(edge_source, tmp_path / "few", BuildOptions(workers=1))
    with pytest.raises(BuildError, match="larger --samples-per-shard"):
        build_shards(edge_source, tmp_path / "many", BuildOptions(workers=1, samples_per_shard=1))
    assert not (tmp_path / "many" / "manifest.json").exists()
