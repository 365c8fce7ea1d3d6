"""Any tar is walked as `tarfile` does it, and names are cut as webdataset does it."""

from __future__ import annotations

import io
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from shardprep.format.foreign_tar import (
    ForeignMember,
    key_and_extension,
    reader_of,
    walk_foreign,
)

NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\n"), min_size=1)
TYPES = st.sampled_from(
    [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE]
)
MEMBERS = st.lists(
    st.tuples(
        st.one_of(
            NAMES, st.sampled_from(["long/" * 60 + "x.npy", "n" * 300, "a/b.c.npy", "./1.npy"])
        ),
        TYPES,
        st.integers(0, 1500),
        st.floats(0, 1e9),
    ),
    max_size=6,
)


def walked(data: bytes) -> list[ForeignMember]:
    return list(walk_foreign(lambda at, size: data[at : at + size], len(data)))


def tar_of(members: list[tuple[str, bytes, int, float]], format: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, kind, size, mtime in members:
            info = tarfile.TarInfo(name)
            info.type, info.mtime, info.linkname = kind, mtime, "elsewhere/" * 20
            info.size = size if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(b"x" * info.size))
    return file.getvalue()


@given(MEMBERS, st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
def test_the_members_are_those_that_tarfile_finds(
    members: list[tuple[str, bytes, int, float]], format: int
) -> None:
    data = tar_of(members, format)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [
            (found.name, found.offset_data, found.size, found.isreg()) for found in tar.getmembers()
        ]
    assert [tuple(member) for member in walked(data)] == expected


@given(st.text("aB./é", max_size=12))
def test_names_are_cut_where_webdataset_cuts_them(name: str) -> None:
    key, extension = base_plus_ext(name)
    assert key_and_extension(name) == (None if key is None else (key, extension.lower()))


@pytest.mark.parametrize("name", ["__meta__/a.npy", "__a.b__", "__x__/y/a.npy"])
def test_members_that_webdataset_passes_over_have_no_key(name: str) -> None:
    assert key_and_extension(name) is None
    assert key_and_extension(f"x/{name}".replace("__", "_")) is not None


def test_a_tar_that_is_cut_anywhere_is_refused() -> None:
    data = tar_of([("a.npy", tarfile.REGTYPE, 700, 0.5), ("b.npy", tarfile.REGTYPE, 10, 0.5)])
    end = len(data) - len(data) % 512
    last = len(data.rstrip(b"\0"))
    whole = -(-last // 512) * 512
    for length in range(1, whole + 1):
        with pytest.raises(tarfile.ReadError):
            walked(data[:length])
    assert len(walked(data[: whole + 512])) == 2
    assert end >= whole + 512


def header(name: str, kind: bytes, size: int, **values: object) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    for field, value in values.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def pax(text: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    return header("pax", kind, len(text)) + text + bytes(-len(text) % 512)


PLAIN = header("a.npy", tarfile.REGTYPE, 0) + bytes(1024)
SPARSE = b"22 GNU.sparse.major=1\n"


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (header("a.npy", tarfile.GNUTYPE_SPARSE, 0) + bytes(1024), "is a sparse file"),
        (pax(SPARSE) + PLAIN, "sparse file"),
        (header("a.npy", tarfile.REGTYPE, 4000) + bytes(1024), "reaches beyond the end"),
        (header("a.npy", tarfile.REGTYPE, 2**70) + bytes(1024), "reaches beyond the end"),
        (header("a.npy", tarfile.REGTYPE, -512) + bytes(1024), "reaches beyond the end"),
        (header("p", tarfile.XHDTYPE, 2**40) + bytes(1024), "is too large"),
        (header("p", tarfile.GNUTYPE_LONGNAME, 2 << 20) + bytes(3 << 20), "is too large"),
        (header("p", tarfile.XHDTYPE, -1) + bytes(1024), "is too large"),
        (pax(b"") * 40 + PLAIN, "too many extended headers"),
        (pax(b"14 size=2e30\n") + PLAIN, "PAX header is damaged"),
        (pax(b"13 size=2e30\n") + PLAIN, "a size that is no number"),
        (pax(b"999 path=x\n") + PLAIN, "PAX header is damaged"),
        (pax(b"0 path=x\n") + PLAIN, "PAX header is damaged"),
        (pax(b"10 path=x\n", tarfile.XGLTYPE) + PLAIN, "a global header"),
        (b"\1" * 512 + bytes(1024), "is damaged"),
    ],
)
def test_hostile_headers_are_refused_by_name(data: bytes, what: str) -> None:
    with pytest.raises(tarfile.ReadError, match=what):
        walked(data)


def test_a_header_says_the_name_and_size_of_one_member_only() -> None:
    data = pax(b"14 path=b.npy\n13 size=0005\n") + header("a", tarfile.REGTYPE, 0) + b"12345"
    data += bytes(507) + header("c.npy", tarfile.REGTYPE, 0) + bytes(1024)
    assert [(m.name, m.size) for m in walked(data)] == [("b.npy", 5), ("c.npy", 0)]


def test_a_file_with_holes_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "holes.tar"
    with open(path, "wb") as file:
        file.write(header("a.npy", tarfile.REGTYPE, 2**33))
        file.seek(2**33, io.SEEK_CUR)
        file.write(header("p", tarfile.GNUTYPE_LONGNAME, 2**33))
        file.truncate(2**35)
    tracemalloc.start()
    with open(path, "rb") as file, pytest.raises(tarfile.ReadError, match="too large"):
        list(walk_foreign(reader_of(file), path.stat().st_size))
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_names_that_are_not_utf_8_come_through(write_tar: Callable[..., Path]) -> None:
    data = bytearray(header("xy.npy", tarfile.REGTYPE, 0))
    data[0] = 0xFF
    data[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(data))[0]
    assert walked(bytes(data) + bytes(1024))[0].name == "\udcffy.npy"
