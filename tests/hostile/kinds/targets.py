"""Destinations of a build, and the files that an unfinished build has left there."""

from __future__ import annotations

import os
from pathlib import Path

from forge import (
    edit_record,
    holes,
)

from kinds.registry import GB, kind


def work(folder: Path) -> Path:
    made = folder / ".shardprep-build"
    made.mkdir()
    return made


@kind("target")
def record_leads_outside(folder: Path) -> None:
    """the record of an unfinished shard, otherwise right, names ../../outside/secret"""
    edit_record(folder, lambda record: record["info"].update(file="../../outside/secret"))


@kind("target")
def record_with_other_rows(folder: Path) -> None:
    """the record of an unfinished shard, otherwise right, has offsets of 2^70"""
    edit_record(folder, lambda record: record["rows"][0].__setitem__(0, 2**70))


@kind("target")
def record_of_10_gb(folder: Path) -> None:
    """the record of an unfinished shard is 10 GB long"""
    holes(work(folder) / "train-000000.tar.json", 10 * GB)


@kind("target")
def record_nested(folder: Path) -> None:
    """the record of an unfinished shard nests lists 100,000 deep"""
    (work(folder) / "train-000000.tar.json").write_text('{"rows": ' + "[" * 100_000)


@kind("target")
def record_pipe(folder: Path) -> None:
    """the record of an unfinished shard is a named pipe"""
    os.mkfifo(work(folder) / "train-000000.tar.json")


@kind("target")
def lock_link(folder: Path) -> None:
    """the lock of an unfinished build is a link to ../outside/secret"""
    (work(folder) / "lock").symlink_to(folder.parent / "outside" / "secret")


@kind("target")
def work_folder_link(folder: Path) -> None:
    """the folder of an unfinished build is a link to ../outside"""
    (folder / ".shardprep-build").symlink_to(folder.parent / "outside")


@kind("target")
def unfinished_shard_link(folder: Path) -> None:
    """an unfinished shard is a link to ../outside/secret"""
    (work(folder) / "train-000000.tar").symlink_to(folder.parent / "outside" / "secret")


@kind("target")
def target_manifest_pipe(folder: Path) -> None:
    """the manifest of the set to be replaced is a named pipe"""
    work(folder)
    os.mkfifo(folder / "manifest.json")
