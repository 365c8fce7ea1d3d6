"""Recover index rows: from an undamaged shard alone, or from a damaged index and its shard."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardprep.check.file_faults import read_legible
from shardprep.errors import CorruptShardError
from shardprep.format import codecs
from shardprep.format.codecs import NPY_FAULTS
from shardprep.format.index import NO_LABEL, IndexRow, is_index, key_fault, scale_in
from shardprep.format.manifest import Manifest
from shardprep.format.quantised import Scale, scale_of
from shardprep.format.tar import BLOCK, Member, content, walk
from shardprep.storage.local import open_regular
from shardprep.storage.trouble import BadPlaceError, machine_errors

# Bytes; more than a label in decimal text needs, and than a .json member does.
_MOST_LABEL, _MOST_TEXT = 20, 1 << 16


def index_of_tar(path: Path, manifest: Manifest) -> tuple[IndexRow, ...]:
    """The index rows of an undamaged shard, from its own headers.

    Raises:
        CorruptShardError: It is not a tar that a build writes.
        StorageError: The machine cannot read it now.
    """
    try:
        with machine_errors(path), open_regular(path) as tar:
            return tuple(_rows(tar, manifest))
    except (OSError, tarfile.TarError, ValueError) as error:
        raise CorruptShardError(f"is not a shard of a build ({error})", file=path) from None


def _rows(tar: io.BufferedReader, manifest: Manifest) -> Iterator[IndexRow]:
    suffix = codecs.member_suffix(manifest.codec)
    members = walk(tar)
    for mel in members:
        key = mel.name.removesuffix(suffix)
        after = list(itertools.islice(members, 2))
        names = [member.name for member in after]
        if key == mel.name or names != [f"{key}.cls", f"{key}.json"]:
            raise tarfile.ReadError(f"{mel.name!a} is not the first member of an utterance")
        label = int(content(tar, after[0], _MOST_LABEL))
        payload = content(tar, mel, mel.size)
        frames = len(codecs.decode(payload, manifest.codec))
        if key_fault(key) or not NO_LABEL <= label < len(manifest.speakers):
            raise tarfile.ReadError(f"{mel.name!a} is not an utterance of this set")
        scale = _scale(tar, after[1], manifest)
        yield IndexRow(mel.offset, mel.size, frames, label, zlib.crc32(payload), key, scale)


def _scale(tar: io.BufferedReader, about: Member, manifest: Manifest) -> Scale | None:
    """The scale of a matrix of uint8, from its .json member. ValueError if there is none."""
    if not manifest.is_quantised:
        return None
    try:
        return scale_of(json.loads(content(tar, about, _MOST_TEXT)))
    except RecursionError as error:
        raise ValueError(str(error)) from None


def confirmed_rows(
    path: Path, size: int, number: int, shard: Path, manifest: Manifest
) -> NDArray[Any] | None:
    """Those rows of a damaged index that the shard confirms; the shard may be damaged too.

    A row is confirmed if its crc32 is that of the bytes that it points to, and if its key, length,
    label and scale are those of the members there.

    Args:
        path: The index file.
        size: Its size, by the manifest.
        number: The shard's number in its split.
        shard: The shard's file.
        manifest: Manifest of the set.

    Returns:
        The rows, or None where the index cannot be read at all.

    Raises:
        StorageError: The machine cannot read a file now.
    """
    data = read_legible(path, size)
    file = io.BytesIO(data)
    try:
        np.lib.format.read_magic(file)
        dtype = np.lib.format.read_array_header_1_0(file)[2]
        count = (len(data) - file.tell()) // dtype.itemsize
        rows: NDArray[Any] = np.frombuffer(data, dtype, count, file.tell())
        if not is_index(rows, quantised=manifest.is_quantised):
            return None
    except NPY_FAULTS:
        return None
    rows = rows[rows["shard"] == number]
    confirmed = np.zeros(len(rows), bool)
    # A shard that is missing, or is no file, confirms nothing.
    with contextlib.suppress(OSError), machine_errors(shard), open_regular(shard) as tar:
        # A seek far beyond the end of a file fails like a call that the file system lacks.
        inside = rows["offset"] < os.fstat(tar.fileno()).st_size
        for place in np.flatnonzero(inside):
            confirmed[place] = _is_confirmed(rows[place], tar, manifest)
    rows = rows[confirmed]
    # Each key once, in the order of the shard.
    rows = rows[np.sort(np.unique(rows["key"], return_index=True)[1])]
    return rows


def _is_confirmed(row: Any, tar: io.BufferedReader, manifest: Manifest) -> bool:
    try:
        key = row["key"].decode()
        offset, label = int(row["offset"]), int(row["label"])
        if offset < BLOCK:
            return False
        mel, cls, about = itertools.islice(walk(tar, offset - BLOCK), 3)
        payload = content(tar, mel, mel.size)
        return (
            mel == (key + codecs.member_suffix(manifest.codec), offset, int(row["nbytes"]))
            and zlib.crc32(payload) == row["crc32"]
            and len(codecs.decode(payload, manifest.codec)) == row["frames"]
            and cls.name == f"{key}.cls"
            and label == int(content(tar, cls, _MOST_LABEL))
            and NO_LABEL <= label < len(manifest.speakers)
            and about.name == f"{key}.json"
            and scale_in(row) == _scale(tar, about, manifest)
        )
    except (BadPlaceError, tarfile.TarError, ValueError, OverflowError):
        return False
