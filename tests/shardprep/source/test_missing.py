"""A file that is not there: what is there instead, and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from shardprep.source.dataset import scan_dataset

Sources = Callable[..., Path]
Edit = Callable[[Path], None]


def renamed(name: str) -> Edit:
    """The file has another name than the metadata say."""
    return lambda path: path.rename(path.parent / name) and None


def linked(target: str) -> Edit:
    def edit(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return edit


def listed_as(name: str) -> Edit:
    """The metadata have another name than the file."""

    def edit(path: Path) -> None:
        metadata = path.parent / "metadata.json"
        metadata.write_text(metadata.read_text().replace('"ann-000.pt"', json.dumps(name)))

    return edit


CAUSES: dict[str, tuple[Edit, str]] = {
    "nothing": (Path.unlink, "the file does not exist"),
    "download": (
        renamed("ann-000.pt.part"),
        "the file does not exist, but ann-000.pt.part does: a download that is not complete",
    ),
    "DVC": (
        renamed("ann-000.pt.dvc"),
        "the file does not exist, but ann-000.pt.dvc does: run `dvc pull`",
    ),
    "compressed": (
        renamed("ann-000.pt.gz"),
        "the file does not exist, but ann-000.pt.gz does: decompress it",
    ),
    "iCloud": (
        renamed(".ann-000.pt.icloud"),
        "the file does not exist on this machine: iCloud has it; download it in the Finder",
    ),
    "case": (
        renamed("Ann-000.pt"),
        "the file does not exist, but 'Ann-000.pt' does: the case differs; rename one of the two",
    ),
    "percent": (
        listed_as("ann%2D000.pt"),
        "the file does not exist, but 'ann-000.pt' does; correct the name where it is listed",
    ),
    "space": (
        listed_as(" ann-000.pt"),
        "the file does not exist, but 'ann-000.pt' does; correct the name where it is listed",
    ),
    "folder above": (
        listed_as("Dataset/ann-000.pt"),
        "the file does not exist, but ann-000.pt exists; remove Dataset/ from the paths that "
        "are listed",
    ),
    "absolute path of another machine": (
        listed_as("/home/ann/Dataset/ann-000.pt"),
        "the path is absolute and leads outside the data set, but ann-000.pt exists; remove "
        "/home/ann/Dataset/ from the paths that are listed",
    ),
    "absolute path of Windows": (
        listed_as("D:\\Dataset\\ann-000.pt"),
        "the path is absolute and leads outside the data set, but ann-000.pt exists; remove "
        "D:/Dataset/ from the paths that are listed",
    ),
    "path from another folder": (
        listed_as("../Dataset/ann-000.pt"),
        "the path leads outside the data set, but ann-000.pt exists; remove ../Dataset/ from the "
        "paths that are listed",
    ),
    "absolute path of nothing": (
        listed_as("/etc/passwd.pt"),
        "the path is absolute and leads outside the data set; write paths relative to the folder "
        "of metadata.json",
    ),
    "no folder": (listed_as("s/t.pt"), "the file does not exist, nor does its folder"),
    "within a file": (listed_as("ann-001.pt/t.pt"), "the file does not exist, nor does its folder"),
    "annex": (
        linked("../.git/annex/objects/Zk/x"),
        "the file is not here: run `git annex get` (DataLad: `datalad get`)",
    ),
    "hub": (
        linked("../../blobs/0123"),
        "the file is a link to '../../blobs/0123', which the cache does not have; download it "
        "again",
    ),
    "link": (linked("gone"), "the file is a link to 'gone', which does not exist"),
}


@pytest.mark.parametrize("name", CAUSES)
def test_the_reason_names_what_is_there_instead(source_of: Sources, name: str) -> None:
    root = source_of({"ann": [3, 4], "bob": [5]})
    edit, reason = CAUSES[name]
    edit(root / "ann-000.pt")
    found = scan_dataset(root)
    assert [reject.reason for reject in found.rejects] == [reason]
    assert len(found.labelled) == 2
