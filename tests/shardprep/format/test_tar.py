"""A shard's members are the ones that tarfile finds, and only plain files are accepted."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from shardprep.format.tar import Member, content, walk
from shardprep.storage.local import open_regular


def members(path: Path) -> list[Member]:
    with open_regular(path) as file:
        return list(walk(file))


def test_members_are_the_ones_that_tarfile_finds(edge_sets: dict[tuple[str, str], Path]) -> None:
    for folder in edge_sets.values():
        for path in folder.glob("*.tar"):
            with tarfile.open(path) as tar, open_regular(path) as file:
                found = list(walk(file))
                assert [(m.name, m.offset_data, m.size) for m in tar] == found
                for ours, theirs in zip(found, tar, strict=True):
                    opened = tar.extractfile(theirs)
                    assert opened is not None
                    assert content(file, ours, ours.size) == opened.read()


def test_content_larger_than_expected_is_refused(edge_set: Path) -> None:
    path = edge_set / "train-000000.tar"
    with open_regular(path) as file:
        first = next(walk(file))
        with pytest.raises(tarfile.ReadError, match=r"expected at most 10$"):
            content(file, first, 10)


def link(info: tarfile.TarInfo) -> None:
    info.type, info.linkname = tarfile.SYMTYPE, "../outside"


def pax(info: tarfile.TarInfo) -> None:
    info.type = tarfile.XHDTYPE


def sparse(info: tarfile.TarInfo) -> None:
    info.type = tarfile.GNUTYPE_SPARSE


def large(info: tarfile.TarInfo) -> None:
    info.size = 2**70


def negative(info: tarfile.TarInfo) -> None:
    info.size = -1


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (link, "is not a plain file"),
        (pax, "is not a plain file"),
        (sparse, "is not a plain file"),
        (large, "reaches beyond the end"),
        (negative, "reaches beyond the end"),
    ],
)
def test_other_members_are_refused(
    tmp_path: Path, change: Callable[[tarfile.TarInfo], None], what: str
) -> None:
    info = tarfile.TarInfo("a.json")
    info.size = 3
    change(info)
    path = tmp_path / "a.tar"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"{}\n".ljust(512, b"\0") + bytes(1024))
    with pytest.raises(tarfile.ReadError, match=what):
        members(path)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in ("a.cls", "a.json"):
            info = tarfile.TarInfo(name)
            info.size = 600
            tar.addfile(info, io.BytesIO(bytes(600)))
    data = buffer.getvalue()[: 2 * (512 + 1024) + 512]
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    assert [m.name for m in members(path)] == ["a.cls", "a.json"]
    for size in range(0, len(data), 100):
        path.write_bytes(data[:size])
        with pytest.raises(tarfile.ReadError):
            members(path)
