"""Verify a shard by its own tar headers: each member must be what the index says."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections.abc import Callable, Generator, Iterator

import numpy as np

from shardprep.check.report import Fault
from shardprep.errors import CorruptShardError
from shardprep.format import codecs
from shardprep.format.index import NO_LABEL, scale_in
from shardprep.format.manifest import Manifest, ShardInfo
from shardprep.format.tar import Member, content, walk
from shardprep.read.files import Files
from shardprep.read.split import Split
from shardprep.storage.local import open_regular
from shardprep.storage.trouble import machine_errors

# Bytes; more than a .cls or a .json member needs.
_MOST_TEXT = 1 << 16


def tar_faults(
    files: Files, info: ShardInfo, split: Split, indices: np.ndarray, manifest: Manifest
) -> Iterator[Fault]:
    """Walk the tar of a shard and compare its members with the index.

    Args:
        files: The files of the set.
        info: The shard.
        split: Its split.
        indices: The utterances of the split that the shard holds, in order.
        manifest: Manifest of the set.

    Raises:
        StorageError: The machine cannot read the shard now.
    """
    suffix = codecs.member_suffix(manifest.codec)

    def check(tar: io.BufferedReader) -> Iterator[Fault]:
        members = walk(tar)
        for index in map(int, indices):
            for fault in _utterance_faults(tar, members, split, index, suffix, manifest):
                yield Fault(info.file, str(split.keys[index]), fault)
        if (extra := next(members, None)) is not None:
            name = extra.name if extra.name.isprintable() else ascii(extra.name)
            yield Fault(info.file, name, "is a member that the index does not have")

    yield from faults_of_opened(files, info, check)


def faults_of_opened(
    files: Files, info: ShardInfo, check: Callable[[io.BufferedReader], Iterator[Fault]]
) -> Generator[Fault, None, bool]:
    """Open the tar of a shard; what `check` finds in it, or that it is no tar.

    Returns:
        False where a store has damaged the file, which is reported already.

    Raises:
        StorageError: The machine cannot read the shard now.
    """
    try:
        with files.lend(info) as path, machine_errors(path), open_regular(path) as tar:
            yield from check(tar)
    except (tarfile.TarError, OSError) as error:
        yield Fault(info.file, "", f"is a damaged tar: {error}")
    except CorruptShardError:
        return False
    return True


def _utterance_faults(
    tar: io.BufferedReader,
    members: Iterator[Member],
    split: Split,
    index: int,
    suffix: str,
    manifest: Manifest,
) -> list[str]:
    """What is wrong with the members of one utterance; ReadError if the tar ends too early."""
    faults = []
    key, row, label = str(split.keys[index]), split.locations[index], int(split.labels[index])
    mel = _next(members)
    if mel.name != key + suffix:
        faults.append(f"the tar has {mel.name!a} where the index has {key + suffix}")
    if (mel.offset, mel.size) != (int(row["offset"]), int(row["nbytes"])):
        faults.append("is at another place in the tar than the index says")
    elif zlib.crc32(content(tar, mel, mel.size)) != int(row["crc32"]):
        faults.append("the member's bytes do not match the crc32 in the index")
    cls = _next(members)
    if cls.name != f"{key}.cls" or content(tar, cls, _MOST_TEXT) != str(label).encode():
        faults.append(f"{cls.name!a} is not the label {label}")
    json_member = _next(members)
    speaker = "" if label == NO_LABEL else manifest.speakers[label]
    try:
        found = json.loads(content(tar, json_member, _MOST_TEXT))
        expected = {"frames": int(split.frames[index]), "speaker": speaker}
        if (scale := scale_in(row)) is not None:
            expected |= scale._asdict()
        agrees = all(found[name] == value for name, value in expected.items())
    except (ValueError, KeyError, TypeError, RecursionError):
        agrees = False
    if json_member.name != f"{key}.json" or not agrees:
        faults.append(f"{json_member.name!a} does not agree with the index")
    return faults


def _next(members: Iterator[Member]) -> Member:
    member = next(members, None)
    if member is None:
        raise tarfile.ReadError("it ends before the last utterance of the index")
    return member
