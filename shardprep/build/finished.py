"""A finished set that a build finds: is it what this build would make?

Sizes and the metadata are in the source fingerprint. Files can change and keep their size, and a
copy of other files can have older times. So the set remembers what its files looked like, and files
that look otherwise now are read and compared with what is stored.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np

from shardprep.build.options import BuildOptions
from shardprep.build.plan import ShardTask
from shardprep.build.pools.pool import Pool, ProgressListener, run_shards
from shardprep.build.shard import check_shard
from shardprep.errors import BuildError, StorageError
from shardprep.format.manifest import SOURCE_TIMES_NAME, BuildRecord, CodecInfo, Manifest
from shardprep.format.source_times import decode_times, encode_times
from shardprep.read.files import Files, Origin, files_at
from shardprep.read.sidecars import load_index, read_rejects
from shardprep.read.split import Split
from shardprep.source.contents import Source, Utterance
from shardprep.storage.local import publish_bytes, read_at_most
from shardprep.storage.remote import Location, Remote
from shardprep.storage.trouble import storage_errors


def check_same_build(
    manifest: Manifest, target: Location, source: Source, options: BuildOptions
) -> None:
    """Make sure that a finished set has the source and the options of this build, and all files.

    Raises:
        BuildError: It has not.
    """
    differences = list(_differences(manifest, source, options))
    if differences:
        raise BuildError(
            f"the folder holds a finished set, built {' and '.join(differences)}",
            file=target,
            remedy="Name another folder, or give --overwrite to replace the set.",
        )
    present = _sizes(target, manifest.files())
    for name, info in manifest.files().items():
        if present.get(name) != info.bytes:
            raise BuildError(
                f"{name} of the finished set is missing or has another size",
                file=target,
                remedy="Give --overwrite to build the set again.",
            )


def _differences(manifest: Manifest, source: Source, options: BuildOptions) -> Iterator[str]:
    """How a finished set was built otherwise than this build would build it."""
    if source.fingerprint != manifest.source_fingerprint:
        yield "from another source"

    def named(build: BuildRecord | None, dtype: str, codec: CodecInfo) -> dict[str, Any]:
        own: dict[str, Any] = msgspec.to_builtins(codec)
        own |= {"codec": own.pop("name"), "dtype": dtype}
        return own if build is None else own | msgspec.to_builtins(build)

    wanted = named(options.record, options.dtype, options.codec_info)
    found = named(manifest.build, manifest.dtype, manifest.codec)
    other = [
        f"{name} {found[name]}, not {wanted[name]}"
        for name in wanted.keys() & found.keys()
        if found[name] != wanted[name]
    ]
    if other:
        yield f"with other options ({'; '.join(sorted(other))})"


def changed_since(target: Location, source: Source) -> list[Utterance]:
    """The utterances whose files do not certainly look as they did when the set was built."""
    utterances = source.utterances
    # Trouble with this file is none: the contents decide.
    data = b""
    with contextlib.suppress(OSError, StorageError):
        most = len(times_of(source))
        path = target / SOURCE_TIMES_NAME
        data = path.read(0, most + 1) if isinstance(path, Remote) else read_at_most(path, most)
    before = decode_times(data, source.fingerprint, len(utterances))
    now = np.array([utterance.version for utterance in utterances], np.uint64)
    return [utterances[index] for index in np.flatnonzero((before != now) | (now == 0)).tolist()]


def times_of(source: Source) -> bytes:
    """The content of source-times.npy for a set that is built now."""
    versions = [utterance.version for utterance in source.utterances]
    return encode_times(source.fingerprint, versions)


def check_contents(
    manifest: Manifest,
    target: Location,
    source: Source,
    tasks: Sequence[ShardTask],
    changed: Sequence[Utterance],
    pool: Pool,
    listener: ProgressListener,
) -> str | None:
    """Make sure that files hold what the finished set has stored of them, and remember this.

    Args:
        manifest: Manifest of the set.
        target: Where the set is.
        source: The data set.
        tasks: Its shards, as this build would write them.
        changed: The utterances to compare.
        pool: Reads and encodes the files, as a build does.
        listener: Receives the progress.

    Returns:
        What a user should know, if the result cannot be remembered.

    Raises:
        BuildError: Files are not those that the set was built from.
        CorruptShardError: An index, rejects.jsonl or a shard of the set is damaged.
        StorageError: The disk or a store failed.
    """
    keys = {utterance.key for utterance in changed}
    files = files_at(target)
    records = run_shards(list(_only(tasks, keys)), check_shard, pool, listener)
    now: dict[str, Any] = {reject.key: reject.reason for r in records for reject in r.rejects}
    now.update((row.key, (row.nbytes, row.frames, row.crc32)) for r in records for row in r.rows)
    stored = _stored(files, manifest, keys)
    other = [utterance for utterance in changed if now[utterance.key] != stored.get(utterance.key)]
    if manifest.codec.name == "zstd":
        # Another release of zstandard may have other bytes for the same matrix.
        other = _with_other_matrices(other, files, manifest, source)
    if other:
        raise BuildError(
            f"{len(other)} of {len(source.utterances)} files of the data set are not those that "
            f"the set was built from, such as {other[0].path}",
            file=target,
            remedy="Compare them with `shardprep verify --against`, or build the set again with "
            "--overwrite.",
        )
    try:
        _remember(target, times_of(source))
    except StorageError as error:
        return f"the next build will compare these files again: {error}"
    return None


def _only(tasks: Sequence[ShardTask], keys: set[str]) -> Iterable[ShardTask]:
    """The tasks with only some of their utterances, whose faults are collected."""
    for task in tasks:
        some = tuple(u for u in task.plan.utterances if u.key in keys)
        if some:
            plan = dataclasses.replace(task.plan, utterances=some)
            yield dataclasses.replace(task, plan=plan, skip=True)


def _stored(files: Files, manifest: Manifest, keys: set[str]) -> dict[str, Any]:
    """What a set has of some utterances: size, frames and crc32, or why they were left out."""
    found: dict[str, Any] = {
        reject.key: reject.reason
        for reject in read_rejects(files, manifest)
        if reject.repeats is None and reject.key in keys
    }
    for split in manifest.splits.values():
        rows = load_index(files, split)
        columns = (rows[field].tolist() for field in ("key", "nbytes", "frames", "crc32"))
        for key, *values in zip(*columns, strict=True):
            if (text := key.decode()) in keys:
                found[text] = tuple(values)
    return found


def _with_other_matrices(
    utterances: Sequence[Utterance], files: Files, manifest: Manifest, source: Source
) -> list[Utterance]:
    """Those of some utterances whose files have another matrix than the set."""
    splits = (
        [Split(name, [Origin(files, manifest)]) for name in manifest.splits] if utterances else []
    )
    places = {str(key): (s, index) for s in splits for index, key in enumerate(s.keys)}
    other = []
    for utterance, mel in source.reader.read(utterances, source.n_mels):
        if isinstance(mel, ValueError) or utterance.key not in places:
            other.append(utterance)
            continue
        split, index = places[utterance.key]
        with np.errstate(over="ignore"):
            if not np.array_equal(mel.astype(split.dtype), split.read(index)):
                other.append(utterance)
    return other


def _remember(target: Location, data: bytes) -> None:
    path = target / SOURCE_TIMES_NAME
    if isinstance(path, Remote):
        path.write(data)
    else:
        publish_bytes(path, data)


def _sizes(target: Location, names: Iterable[str]) -> dict[str, int]:
    """Sizes of some files in a place, by name; of those that are there."""
    if isinstance(target, Remote):
        return {name: info["size"] for name, info in target.listing().items()}
    with storage_errors(target):
        present = set(os.listdir(target))
        return {name: os.stat(target / name).st_size for name in names if name in present}
