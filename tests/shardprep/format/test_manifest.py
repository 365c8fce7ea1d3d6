"""The manifest says what the set holds, and any other version or alteration is refused."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import fsspec
import msgspec
import numpy as np
import pytest

from shardprep import BuildOptions, FormatError, build_shards, open_shards, verify_shards
from shardprep.format.index import index_dtype, is_index
from shardprep.format.manifest import FileInfo, Manifest, decode_manifest, encode_manifest
from shardprep.read.manifest_file import load_manifest
from shardprep.storage import connections


@pytest.fixture
def manifest(edge_set: Path) -> Manifest:
    return load_manifest(edge_set)


def test_manifest_survives_encoding_and_decoding(manifest: Manifest) -> None:
    assert decode_manifest(encode_manifest(manifest), Path("m")) == manifest


def test_manifest_is_ordinary_json_with_the_counts_of_the_files(edge_set: Path) -> None:
    content = json.loads((edge_set / "manifest.json").read_text())
    assert (content["format"], content["version"], content["n_mels"]) == ("shardprep", 2, 7)
    assert content["speakers"] == ["ann", "bob", "cleo"]
    for name, split in content["splits"].items():
        rows = np.load(edge_set / split["index"]["file"])
        assert split["samples"] == len(rows) == sum(s["samples"] for s in split["shards"])
        assert split["frames"] == rows["frames"].sum() == sum(s["frames"] for s in split["shards"])
        on_disk = sorted(path.name for path in edge_set.glob(f"{name}-*.tar"))
        assert on_disk == [shard["file"] for shard in split["shards"]]


@pytest.mark.parametrize(
    ("field", "value", "found"),
    [
        ("version", 3, "found format 'shardprep' version 3, expected 'shardprep' version 2"),
        ("version", "2", "version '2', expected 'shardprep' version 2"),
        ("version", None, "version None, expected 'shardprep' version 2"),
        ("format", "mds", "found format 'mds' version 2, expected 'shardprep' version 2"),
        (
            "dtype",
            "int8",
            "Invalid enum value 'int8'",
        ),
    ],
)
def test_other_format_or_version_is_refused_with_found_and_expected(
    edge_set: Path, tmp_path: Path, field: str, value: Any, found: str
) -> None:
    content = json.loads((edge_set / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**content, field: value}))
    with pytest.raises(FormatError, match=re.escape(found)) as caught:
        open_shards(tmp_path)
    assert caught.value.file == str(tmp_path / "manifest.json")
    assert caught.value.remedy


def test_version_1_is_refused_with_the_command_that_builds_anew(
    edge_source: Path, edge_set: Path, tmp_path: Path
) -> None:
    old = tmp_path / "shards"
    shutil.copytree(edge_set, old)
    content = json.loads((old / "manifest.json").read_text())
    del content["features"]
    (old / "manifest.json").write_text(json.dumps({**content, "version": 1}))
    with pytest.raises(FormatError, match="version 1, expected 'shardprep' version 2") as caught:
        open_shards(old)
    # Nothing is wrong with such a set, so verify finds no fault in it either.
    with pytest.raises(FormatError, match="version 1"):
        verify_shards(old)
    assert caught.value.remedy is not None
    command = caught.value.remedy.split("`")[1].replace("SRC", str(edge_source)).split()
    assert command == ["shardprep", "build", str(edge_source), str(old), "--overwrite"]
    build_shards(edge_source, old, BuildOptions(workers=1, overwrite=True))
    assert open_shards(old).manifest.version == 2


def test_version_1_behind_a_url_is_refused_and_built_anew_likewise(
    edge_source: Path, edge_set: Path
) -> None:
    url = "memory://manifests/old"
    store = fsspec.filesystem("memory")
    try:
        for path in edge_set.iterdir():
            data = path.read_bytes()
            if path.name == "manifest.json":
                data = data.replace(b'"version": 2', b'"version": 1')
            store.pipe(f"{url}/{path.name}", data)
        with pytest.raises(FormatError, match=f"version 1, .*`shardprep build SRC {url} --over"):
            open_shards(url)
        with pytest.raises(FormatError, match="version 1"):
            build_shards(edge_source, url, BuildOptions(workers=1))
        build_shards(edge_source, url, BuildOptions(workers=1, overwrite=True))
        assert open_shards(url).manifest.version == 2
    finally:
        store.store.clear()
        connections.forget_connections()


def test_features_are_null_or_a_flat_object_that_readers_keep(manifest: Manifest) -> None:
    assert manifest.features is None
    recipe = {"sample_rate": 16000, "window": "hann", "floor": 1e-9, "normalised": False, "x": None}
    known = msgspec.structs.replace(manifest, features=recipe)
    assert decode_manifest(encode_manifest(known), Path("m")).features == recipe
    nested = msgspec.structs.replace(manifest, features={"stft": {"hop": 160}})  # type: ignore[dict-item]
    with pytest.raises(FormatError, match="features"):
        decode_manifest(encode_manifest(nested), Path("m"))


def test_only_builds_that_hold_speakers_out_say_so(manifest: Manifest) -> None:
    # Sets of earlier releases stay as they are, with their fingerprints.
    assert manifest.build is not None
    build = json.loads(encode_manifest(manifest))["build"]
    assert build.keys() == {"seed", "val_fraction", "samples_per_shard", "on_error"}
    held = msgspec.structs.replace(
        manifest, build=msgspec.structs.replace(manifest.build, val_speakers=0.05)
    )
    assert json.loads(encode_manifest(held))["build"] == {**build, "val_speakers": 0.05}
    assert decode_manifest(encode_manifest(held), Path("m")).build == held.build


def test_a_set_that_no_build_made_is_read_without_build_and_source(manifest: Manifest) -> None:
    written = msgspec.structs.replace(manifest, build=None, source_fingerprint=None)
    assert decode_manifest(encode_manifest(written), Path("m")).build is None


def test_every_flipped_bit_is_refused(manifest: Manifest) -> None:
    data = encode_manifest(manifest)
    for bit in random.Random(0).sample(range(8 * len(data)), 1500):
        hurt = bytearray(data)
        hurt[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError):
            decode_manifest(bytes(hurt), Path("manifest.json"))


def test_edit_by_hand_is_reported_as_altered(manifest: Manifest) -> None:
    text = encode_manifest(manifest).decode().replace('"ann"', '"eve"')
    with pytest.raises(FormatError, match="was altered"):
        decode_manifest(text.encode(), Path("manifest.json"))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"format": "shard\xffprep"}',
        b'{"format": "shardprep", "version": 2}',
        b'{"format": "shardprep", "version": 2, "n_mels": "many"}',
        b'{"format": "shardprep", "version": 2, "n_mels": ' + b"[" * 100_000,
    ],
    ids=range(9),
)
def test_a_file_that_is_not_a_manifest_is_a_format_error(data: bytes) -> None:
    with pytest.raises(FormatError, match=r"^manifest\.json: "):
        decode_manifest(data, Path("manifest.json"))


@pytest.mark.parametrize("name", ["../other/train.tar", "/etc/passwd", ".hidden", "a/b.tar"])
def test_names_that_lead_outside_are_refused_even_when_signed(
    manifest: Manifest, name: str
) -> None:
    forged = msgspec.structs.replace(manifest, rejects=FileInfo(name, 1, "0" * 64))
    with pytest.raises(FormatError, match="outside the folder"):
        decode_manifest(encode_manifest(forged), Path("manifest.json"))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (bytes(900), "holds nothing but zero bytes"),
        (b'{\n "format": "shardprep",\n "vers', "ends early, after 32 bytes, as after"),
        (b"<html><title>Index of /</title>", r"is a web page \(its title: 'Index of /'\)"),
        (b'{"message": "Not Found"}', r"is an error message of a server \('Not Found'\)"),
    ],
)
def test_what_stands_in_place_of_a_manifest_is_named(
    tmp_path: Path, data: bytes, said: str
) -> None:
    (tmp_path / "manifest.json").write_bytes(data)
    with pytest.raises(FormatError, match=rf"manifest\.json: {said}.*Copy the shard set again"):
        open_shards(tmp_path)


def test_a_place_that_is_no_shard_folder_is_named(edge_set: Path, tmp_path: Path) -> None:
    for name, said in {
        "metadata.json": r"but a data set\. Name the folder that `shardprep build \S+ DST` writes",
        "model.safetensors": "but a model folder",
        "config.yaml": r"but a run folder.* config\.yaml says it at data\.shards",
    }.items():
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(FormatError, match=f"is not a shard folder, {said}"):
            open_shards(tmp_path)
        (tmp_path / name).unlink()
    with pytest.raises(FormatError, match=f"is not a shard folder, but a file. Name .*{edge_set}"):
        open_shards(edge_set / "train-000000.tar")
    with pytest.raises(
        FormatError, match=f"no manifest.json. Name {edge_set}|Name {edge_set.parent}"
    ):
        open_shards(edge_set.parent)
    with pytest.raises(FormatError, match="nowhere: does not exist"):
        open_shards(tmp_path / "nowhere")


def test_folder_without_manifest_says_which_command_makes_one(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"no manifest\.json\. Run `shardprep build"):
        open_shards(tmp_path)
    (tmp_path / ".shardprep-build").mkdir()
    with pytest.raises(FormatError, match="unfinished build.* again to finish it"):
        open_shards(tmp_path)


def test_index_row_is_packed_as_documented() -> None:
    dtype = index_dtype(9)
    assert dtype.itemsize == 4 + 8 + 4 * 4 + 9
    assert [dtype.fields[name][1] for name in dtype.names or ()] == [0, 4, 12, 16, 20, 24, 28]
    assert is_index(np.zeros(3, dtype))
    scaled = index_dtype(9, quantised=True)
    assert scaled.itemsize == dtype.itemsize + 8
    assert [scaled.fields[name][1] for name in ("minimum", "step", "key")] == [28, 32, 36]
    assert is_index(np.zeros(3, scaled), quantised=True)
    assert not is_index(np.zeros(3, scaled))
    assert not is_index(np.zeros(3, dtype), quantised=True)


@pytest.mark.parametrize(
    "rows",
    [
        np.zeros((2, 2), index_dtype(4)),
        np.zeros(2, "<i4"),
        np.zeros(2, [("key", "S4"), ("shard", "<u4")]),
        np.zeros(2, index_dtype(4)).astype(
            [(n, "<i8") if n == "offset" else (n, t) for n, t in index_dtype(4).descr]
        ),
    ],
    ids=["two dimensions", "numbers", "other fields", "signed offset"],
)
def test_other_arrays_are_not_an_index(rows: np.ndarray) -> None:
    assert not is_index(rows)
