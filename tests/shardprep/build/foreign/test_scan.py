"""Reading a tar finds what `tarfile` and NumPy find, and names everything that cannot be mapped."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import re
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from shardprep import SourceError, StorageError
from shardprep.build.foreign.scan import TarRecord, TarTask, file_state, scan_tar

Write = Callable[..., Path]
MEL = np.arange(80, dtype=np.float16).reshape(2, 40)


def scan(path: Path, member: str = "npy", speaker: str = "speaker") -> TarRecord:
    return scan_tar(TarTask(str(path), str(path), member, speaker, file_state(path.stat())))


def npy(array: np.ndarray, version: tuple[int, int] = (1, 0)) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version)
    return file.getvalue()


def with_short_header(array: np.ndarray) -> bytes:
    data = npy(array)
    text = data[10:128].rstrip() + b" \n"
    return data[:8] + len(text).to_bytes(2, "little") + text + data[128:]


def test_offsets_checksums_and_labels_are_those_of_the_standard_library(
    tmp_path: Path, write_tar: Write
) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        f"{'f' * (90 * (n % 2) // 2)}/{n:09d}": rng.normal(size=(n + 1, 40)).astype(np.float32)
        for n in range(30)
    }
    # The last is longer than what is read at a time.
    arrays["long"] = rng.normal(size=(20_000, 40)).astype(np.float32)
    members: list[tuple[str, Any]] = []
    for number, (key, array) in enumerate(arrays.items()):
        version = (2, 0) if number % 3 == 0 else (1, 0)
        members += [(f"{key}.txt", b"a caption"), (f"{key}.Mel.NPY", npy(array, version))]
        members += [(f"{key}.json", {"speaker": number % 3, "x": float("nan")})]
        members += [(f"{key}.cls", str(number % 4).encode())]
    path = write_tar(tmp_path / "a.tar", members)
    record = scan(path, "mel.npy")
    assert record.faults == ()
    assert record.bytes == path.stat().st_size
    assert record.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    with tarfile.open(path) as tar:
        own = [m for m in tar.getmembers() if m.name.endswith(".NPY")]
        for number, (found, member) in enumerate(zip(record.found, own, strict=True)):
            content = tar.extractfile(member).read()  # type: ignore[union-attr]
            assert (found.offset, found.nbytes) == (member.offset_data, len(content))
            assert found.crc32 == zlib.crc32(content)
            assert (found.frames, found.n_mels) == arrays[found.key].shape
            assert found.dtype == "float32"
            assert (found.name, found.number) == (str(number % 3), str(number % 4))


@pytest.mark.parametrize(
    ("members", "what"),
    [
        ([("a.txt", b"")], "has no member .npy"),
        ([("a.npy.gz", gzip.compress(npy(MEL)))], "but .npy.gz, compressed"),
        ([("a.npz", b"")], "but .npz, an .npz archive"),
        ([("a.pyd", pickle.dumps(MEL))], "but .pyd, a pickle"),
        ([("a.mel.npy", MEL)], "has no member .npy, but .mel.npy"),
        ([("a.npy", gzip.compress(npy(MEL)))], "is no .npy file: is compressed with gzip"),
        ([("a.npy", b"")], "is no .npy file"),
        ([("a.npy", np.array([{"a": 1}], object))], "holds Python objects, a pickle"),
        ([("a.npy", MEL.astype(np.float64))], "holds float64, expected little-endian float16"),
        ([("a.npy", MEL.astype(">f4"))], "holds >f4, expected little-endian"),
        ([("a.npy", MEL.astype(np.int16))], "holds int16"),
        ([("a.npy", MEL.astype(np.uint8))], "holds uint8, whose minimum and step nobody knows"),
        ([("a.npy", MEL[0])], r"has the shape \(40,\), expected \(frames, n_mels\)"),
        ([("a.npy", MEL[None])], r"has the shape \(1, 2, 40\)"),
        ([("a.npy", MEL[:0])], r"has the shape \(0, 40\)"),
        ([("a.npy", np.zeros((1, 5000), np.float16))], r"has the shape \(1, 5000\)"),
        ([("a.npy", np.asfortranarray(MEL))], "is in Fortran order"),
        ([("a.npy", with_short_header(MEL))], r"npy header of 7\d bytes, expected 128"),
        ([("a.npy", npy(MEL)[:-2])], "has 286 bytes, and its header says 288"),
        ([("a.npy", npy(MEL)[:100])], "has no npy header of version 1.0 or 2.0"),
        ([("a.npy", npy(MEL, (3, 0)))], "has no npy header of version 1.0 or 2.0"),
        ([("a.npy", npy(MEL).replace(b"False", b"Fals("))], "npy header"),
        ([("a.npy", np.where(MEL == 70, np.nan, MEL))], "contains NaN or infinity"),
        ([("a.npy", np.where(MEL == 70, np.float16(np.inf), MEL))], "contains NaN or infinity"),
        ([("a.npy", MEL), ("a.NPY", MEL)], "has two members .npy"),
        ([("a.npy", MEL), ("a.json", b"{")], "its member .json is no JSON"),
        ([("a.npy", MEL), ("a.json", b"[" * 100_000)], "its member .json is no JSON"),
        ([("a.npy", MEL), ("a.json", {"speaker": ["x"]})], "neither a text nor a whole number"),
        ([("a.npy", MEL), ("a.json", {"speaker": "x\n"})], "is no name of a speaker"),
        ([("a.npy", MEL), ("a.cls", b"\xff")], "is no text in UTF-8"),
        ([("a.npy", MEL), ("a.cls", bytes(1 << 21))], "far too many"),
        ([("__a.npy", MEL)], 'its key cannot be used: .* begins with "__"'),
        ([(f"{'a' * 89}.npy", MEL)], "its key cannot be used: .* 89 bytes"),
        ([("d/" * 60 + "a.npy", MEL)], "the key has 121 bytes, and a tar takes 88"),
        ([("a\x01.npy", MEL)], "its key cannot be used: .* control characters"),
    ],
)
def test_what_cannot_be_mapped_is_named_with_its_reason(
    tmp_path: Path, write_tar: Write, members: list[tuple[str, Any]], what: str
) -> None:
    good = ("good.npy", MEL)
    record = scan(write_tar(tmp_path / "a.tar", [("first.npy", MEL), *members, good]))
    assert [found.key for found in record.found] == ["first", "good"]
    ((key, reason),) = record.faults
    assert key == members[0][0].split(".")[0]
    assert re.search(what, reason), reason


def test_names_that_are_not_utf8_are_named_and_can_be_kept(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("caf\udce9.npy", "b.\udce9.npy", "c.npy"):
            info = tarfile.TarInfo(name)
            info.size = len(npy(MEL))
            tar.addfile(info, io.BytesIO(npy(MEL)))
    record = scan(tmp_path / "a.tar")
    assert [found.key for found in record.found] == ["c"]
    assert dict(record.faults) == {
        "caf\\udce9": "its key cannot be used: the key is not valid Unicode",
        "b": "has no member .npy, but .\\udce9.npy",
    }
    assert msgspec.json.decode(msgspec.json.encode(record), type=TarRecord) == record


def test_of_a_key_that_comes_twice_none_is_taken(tmp_path: Path, write_tar: Write) -> None:
    members = [("a.npy", MEL), ("b.npy", MEL), ("a.json", {}), ("c.npy", MEL)]
    record = scan(write_tar(tmp_path / "a.tar", members))
    assert [found.key for found in record.found] == ["b", "c"]
    assert [key for key, _ in record.faults] == ["a"]
    assert "comes twice" in record.faults[0][1]


def test_links_are_no_matrices_and_other_members_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("README"))
        folder = tarfile.TarInfo("data.d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("a.npy")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        info = tarfile.TarInfo("b.npy")
        info.size = len(npy(MEL))
        tar.addfile(info, io.BytesIO(npy(MEL)))
    record = scan(path)
    assert [found.key for found in record.found] == ["b"]
    assert record.faults == (("a", "its matrix is a link, a folder or a device"),)


def test_a_tar_that_is_not_complete_has_no_utterance(tmp_path: Path, write_tar: Write) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.npy", MEL), ("b.npy", MEL)])
    whole = path.read_bytes()
    cut = tmp_path / "cut.tar"
    for data, what in [
        (whole.rstrip(b"\0"), "ends|reaches beyond"),
        (whole + whole, "data after its end"),
        (whole[:1000], "ends within|reaches beyond"),
    ]:
        cut.write_bytes(data)
        record = scan(cut)
        assert record.found == ()
        ((key, reason),) = record.faults
        assert key == ""
        assert re.search(what, reason), reason
        assert record.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    ("data", "error", "what"),
    [
        (gzip.compress(b"x", mtime=0), SourceError, "is compressed with gzip; decompress it"),
        (b"", SourceError, "is empty"),
        (b"x" * 600, SourceError, "not a tar"),
        (b"version https://git-lfs.github.com/spec/v1\n", StorageError, "git lfs pull"),
    ],
)
def test_a_file_that_is_no_tar_is_refused_by_what_it_is(
    tmp_path: Path, data: bytes, error: type[Exception], what: str
) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(error, match=what):
        scan(tmp_path / "a.tar")


def test_names_of_members_are_not_taken_for_marks_of_other_files(
    tmp_path: Path, write_tar: Write
) -> None:
    names = ["ID3001", "BZh9", "PK\3\4", "fLaC", "MZ", "OggS"]
    for name in names:
        record = scan(write_tar(tmp_path / "a.tar", [(f"{name}.npy", MEL)]))
        assert len(record.found) + len(record.faults) == 1


def test_a_tar_that_changes_while_it_is_read_is_refused(tmp_path: Path, write_tar: Write) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.npy", MEL), ("b.npy", MEL)])
    task = TarTask(str(path), str(path), "npy", "speaker", file_state(path.stat()))
    with pytest.raises(SourceError, match="changed while it was read"):
        scan_tar(task, lambda nbytes: os.truncate(path, 512))


def test_a_pipe_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    for name in ("pipe.tar", "missing.tar"):
        path = str(tmp_path / name)
        with pytest.raises(SourceError, match="cannot be read"):
            scan_tar(TarTask(path, path, "npy", "speaker", ()))
