"""Destinations of a build, and the files that an unfinished build has left there."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from forge import edit_record, holes, options, pipe

from kinds.registry import GB, Canary, kind
from shardprep import build_shards


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


def finished(folder: Path) -> Path:
    """Build a finished set of the data set beside it; the path of its source-times.npy."""
    build_shards(folder.parent / "Dataset", folder, options())
    return folder / "source-times.npy"


@kind("target")
def times_of_10_gb(folder: Path) -> None:
    """source-times.npy of a finished set is 10 GB long"""
    holes(finished(folder), 10 * GB)


@kind("target")
def times_pipe(folder: Path) -> None:
    """source-times.npy of a finished set is a named pipe"""
    pipe(finished(folder))


@kind("target")
def times_link(folder: Path) -> None:
    """source-times.npy of a finished set is a link to ../outside/secret"""
    path = finished(folder)
    path.unlink()
    path.symlink_to(folder.parent / "outside" / "secret")


@kind("target")
def times_pickle(folder: Path) -> None:
    """source-times.npy of a finished set is a pickled array that runs a command"""
    np.save(finished(folder), np.array([Canary()], object), allow_pickle=True)


@kind("target")
def times_header_of_2_60_numbers(folder: Path) -> None:
    """source-times.npy of a finished set claims 2^60 numbers"""
    path = finished(folder)
    path.write_bytes(path.read_bytes().replace(b"(15,)", b"(%d,)" % 2**60, 1))


@kind("target")
def target_manifest_pipe(folder: Path) -> None:
    """the manifest of the set to be replaced is a named pipe"""
    work(folder)
    os.mkfifo(folder / "manifest.json")
