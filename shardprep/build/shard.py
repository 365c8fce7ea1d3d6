"""Write one shard: a plain POSIX tar of the utterances that the plan puts into it.

The members of an utterance are adjacent: KEY.mel.npy (or .mel.npy.zst), KEY.cls (the label, -1
where unknown) and KEY.json. Times, owners and modes are fixed, so equal contents are equal bytes.
"""

from __future__ import annotations

import itertools
import json
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeAlias

import msgspec
import numpy as np

from shardprep.build.plan import ShardTask
from shardprep.format import codecs
from shardprep.format.index import IndexRow
from shardprep.format.limits import MAX_MEMBER_BYTES, most_matrix_bytes
from shardprep.format.manifest import CodecInfo, Reject, ShardInfo
from shardprep.format.tar import TarWriter
from shardprep.source.dataset import Utterance, source_error
from shardprep.source.features import check_file_size, load_features
from shardprep.storage.local import fetch
from shardprep.storage.remote import Location, Remote

# Called after each utterance, with the bytes read for it.
Advance: TypeAlias = Callable[[int], None]

# A file of a data set: its path, or its bytes, or why it cannot be used.
SourceFile: TypeAlias = Path | bytes | ValueError

# Enough requests at once to keep a disk or a store busy; they take a few MB of memory.
_FILES_AHEAD = 32

# Numbers from here on are rounded to infinity in float16.
_FLOAT16_LIMIT = 65520


class ShardRecord(msgspec.Struct, frozen=True):
    """The result of writing a shard. An unfinished build keeps it, to be resumed.

    Attributes:
        inputs: SHA-256 over everything that decided the bytes; see `ShardTask.inputs`.
        info: The shard's entry in the manifest.
        rows: Its index rows.
        rejects: Utterances that were left out.
        source_bytes: Bytes of the `.pt` files read.
    """

    inputs: str
    info: ShardInfo
    rows: tuple[IndexRow, ...]
    rejects: tuple[Reject, ...]
    source_bytes: int


def write_shard(
    task: ShardTask, file: BinaryIO, advance: Advance = lambda nbytes: None
) -> ShardRecord:
    """Load, check and write the utterances of a shard.

    Args:
        task: What to write.
        file: Where to write it, in one pass from the beginning.
        advance: Called after each utterance, with the bytes read for it.

    Raises:
        SourceError: An utterance is faulty, and the task does not skip such.
    """
    tar = TarWriter(file)
    rows, rejects, source_bytes = [], [], 0
    for utterance, content in files_ahead(task.root, task.plan.utterances, task.n_mels):
        try:
            payload = encode_file(
                content,
                n_mels=task.n_mels,
                frames=utterance.frames,
                dtype=task.dtype,
                codec=task.codec,
            )
        except ValueError as fault:
            split = "test" if utterance.speaker is None else "labelled"
            reject = Reject(
                utterance.path,
                utterance.key,
                utterance.speaker,
                split,
                str(fault),
                utterance.entry,
            )
            if not task.skip:
                raise source_error(reject, task.root) from None
            rejects.append(reject)
        else:
            rows.append(add_utterance(tar, utterance, payload, codecs.member_suffix(task.codec)))
        source_bytes += utterance.nbytes
        advance(utterance.nbytes)
    tar.close()
    frames = sum(row.frames for row in rows)
    info = ShardInfo(task.plan.file, len(rows), frames, tar.size, tar.sha256.hexdigest())
    return ShardRecord(task.inputs, info, tuple(rows), tuple(rejects), source_bytes)


def files_ahead(
    root: Location, utterances: Sequence[Utterance], n_mels: int
) -> Iterator[tuple[Utterance, SourceFile]]:
    """The utterances of the data set at `root` with their files; the next files are read ahead."""
    if isinstance(root, Remote):
        with ThreadPoolExecutor(_FILES_AHEAD) as threads:
            requests = deque[Future[SourceFile]]()
            later = iter(utterances)
            for utterance in utterances:
                for following in itertools.islice(later, _FILES_AHEAD - len(requests)):
                    requests.append(threads.submit(fetch_file, root, following, n_mels))
                yield utterance, requests.popleft().result()
        return
    later = iter(utterances)
    for number, utterance in enumerate(utterances):
        for following in itertools.islice(later, 1 if number else _FILES_AHEAD):
            fetch(os.path.join(root, following.path))
        yield utterance, root / utterance.path


def fetch_file(root: Location, utterance: Utterance, n_mels: int) -> SourceFile:
    """The file of an utterance: its path, or its bytes from a store, or why it cannot be used.

    Raises:
        StorageError: The store does not answer.
    """
    path = root / utterance.path
    if not isinstance(path, Remote):
        return path
    try:
        check_file_size(utterance.nbytes, n_mels=n_mels, frames=utterance.frames)
        # The size is known already, so a ranged read saves one request.
        return path.read(0, utterance.nbytes)
    except ValueError as fault:
        return fault
    except FileNotFoundError:
        return ValueError("the file does not exist")


def encode_file(
    file: SourceFile, *, n_mels: int, frames: int, dtype: str, codec: CodecInfo
) -> bytes:
    """Load a `.pt` file and encode it as the payload that a shard stores.

    Args:
        file: The file, as `fetch_file` gives it.
        n_mels: Mel bins F.
        frames: Mel frames T, by the metadata.
        dtype: Element type to store.
        codec: How to store the matrix.

    Raises:
        ValueError: The file is faulty; the message is meant for `Reject.reason`.
        StorageError: The file cannot be read, through no fault of its own.
    """
    if isinstance(file, ValueError):
        raise file
    mel = load_features(file, n_mels=n_mels, frames=frames)
    if dtype == "float16" and max(mel.max(), -mel.min()) >= _FLOAT16_LIMIT:
        raise ValueError("has values beyond the range of float16; use --dtype float32")
    stored = mel.astype(np.dtype(dtype).newbyteorder("<"))
    if stored.nbytes + codecs.NPY_HEADER_BYTES > MAX_MEMBER_BYTES:
        raise ValueError(f"takes {stored.nbytes} bytes, more than a member of a shard may have")
    payload = codecs.encode(stored, codec)
    if len(payload) > MAX_MEMBER_BYTES or stored.nbytes > most_matrix_bytes(len(payload)):
        raise ValueError(
            f"shrinks from {stored.nbytes} to {len(payload)} bytes, which readers would refuse; "
            "use --codec none"
        )
    return payload


def add_utterance(tar: TarWriter, utterance: Utterance, payload: bytes, suffix: str) -> IndexRow:
    """Append the members of an utterance; `payload` is its encoded matrix."""
    offset = tar.add(utterance.key + suffix, payload)
    # The same members and JSON types in every split: Hugging Face `datasets` takes the columns of
    # all splits from one.
    tar.add(f"{utterance.key}.cls", str(utterance.label).encode())
    about = {
        "frames": utterance.frames,
        "source": f"{utterance.key}.pt",
        "speaker": utterance.speaker or "",
    }
    tar.add(f"{utterance.key}.json", json.dumps(about, sort_keys=True).encode())
    return IndexRow(
        offset,
        len(payload),
        utterance.frames,
        utterance.label,
        zlib.crc32(payload),
        utterance.key,
    )


def check_shard(task: ShardTask, advance: Advance) -> ShardRecord:
    """The record of a shard, for a dry run: nothing is written."""
    with open(os.devnull, "wb") as nowhere:
        return write_shard(task, nowhere, advance)
