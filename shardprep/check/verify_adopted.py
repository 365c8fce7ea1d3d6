"""Verify an adopted tar by its own headers: the matrix of each utterance lies where the index says.

What else the tar has is its writer's business.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Iterator

import numpy as np

from shardprep.build.foreign.members import npy_matrix
from shardprep.check.report import Fault
from shardprep.check.verify_tar import faults_of_opened
from shardprep.format.codecs import NPY_HEADER_BYTES
from shardprep.format.foreign_tar import (
    ForeignMember,
    ReadAt,
    key_and_extension,
    pieces,
    reader_of,
    walk_foreign,
)
from shardprep.format.manifest import Manifest, ShardInfo
from shardprep.read.files import Files
from shardprep.read.split import Split


def adopted_faults(
    files: Files, info: ShardInfo, split: Split, indices: np.ndarray, manifest: Manifest
) -> Iterator[Fault]:
    """Walk an adopted tar, and find each utterance of the index in it.

    Args:
        files: The files of the set.
        info: The shard.
        split: Its split.
        indices: The utterances of the split that the shard holds, in order.
        manifest: Manifest of the set.

    Raises:
        StorageError: The machine cannot read the shard now.
    """
    due = {int(split.locations["offset"][index]): int(index) for index in indices}

    def check(tar: io.BufferedReader) -> Iterator[Fault]:
        read_at = reader_of(tar)
        for member in walk_foreign(read_at, os.fstat(tar.fileno()).st_size):
            if (index := due.pop(member.offset, None)) is not None:
                for what in _faults(read_at, member, split, index, manifest):
                    yield Fault(info.file, str(split.keys[index]), what)

    if (yield from faults_of_opened(files, info, check)):
        for index in due.values():
            yield Fault(info.file, str(split.keys[index]), "no member lies where the index says")


def _faults(
    read_at: ReadAt, member: ForeignMember, split: Split, index: int, manifest: Manifest
) -> Iterator[str]:
    """What is wrong with the member that lies where the index says that an utterance does."""
    row, key = split.locations[index], str(split.keys[index])
    if key_and_extension(member.name) != (key, manifest.member):
        yield f"the tar has {member.name[:100]!a} where the index has {key}.{manifest.member}"
    if member.size != int(row["nbytes"]):
        yield f"has {member.size} bytes in the tar, and {row['nbytes']} in the index"
        return
    head = read_at(member.offset, NPY_HEADER_BYTES)
    crc = zlib.crc32(head)
    for piece in pieces(read_at, member.offset + NPY_HEADER_BYTES, member.offset + member.size):
        crc = zlib.crc32(piece, crc)
    if crc != int(row["crc32"]):
        yield "the member's bytes do not match the crc32 in the index"
        return
    try:
        found = npy_matrix(head, member.size)
    except ValueError as error:
        yield str(error)
        return
    if found != (int(split.frames[index]), manifest.n_mels, manifest.dtype):
        yield f"is {found[2]} {found[:2]}, unlike the index"
