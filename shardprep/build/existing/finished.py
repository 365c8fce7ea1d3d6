"""A finished set that a build finds: is it what this build would make?

Sizes and the metadata are in the source fingerprint. Files can change and keep their size, and a
copy of other files can have older times. So the set remembers what its files looked like, and files
that look otherwise now are read and compared with what is stored.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import msgspec

from shardprep.build.options import BuildOptions
from shardprep.build.plan import ShardTask
from shardprep.build.pools.pool import Pool, ProgressListener, run_shards
from shardprep.build.shard import check_shard
from shardprep.errors import BuildError, StorageError
from shardprep.format.manifest import (
    SOURCE_TIMES_NAME,
    BuildRecord,
    CodecInfo,
    Manifest,
    other_features,
)
from shardprep.format.quantised import Scale, is_rounded
from shardprep.format.source_times import decode_times, encode_times, times_size
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
            remedy="Name another folder, give --append to add what is new to the set, or "
            "--overwrite to replace the set.",
        )
    check_sizes(
        manifest,
        target,
        "Give --overwrite to build the set again, or restore it with `shardprep repair`.",
    )


def check_sizes(manifest: Manifest, target: Location, remedy: str) -> None:
    """Make sure that all files of a finished set are there, with their sizes.

    Raises:
        BuildError: One is not.
    """
    present = _sizes(target, manifest.files())
    for name, info in manifest.files().items():
        if present.get(name) != info.bytes:
            raise BuildError(
                f"{name} of the finished set is missing or has another size",
                file=target,
                remedy=remedy,
            )


def _differences(manifest: Manifest, source: Source, options: BuildOptions) -> Iterator[str]:
    """How a finished set was built otherwise than this build would build it."""
    if source.features != manifest.features:
        yield f"with other features ({other_features(manifest.features, source.features)})"
    elif source.fingerprint != manifest.source_fingerprint:
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
    before = remembered(target, source.fingerprint, versions_of(source))
    return changed_files(source.utterances, before)


def changed_files(utterances: Iterable[Utterance], before: Mapping[str, int]) -> list[Utterance]:
    """Those of some utterances whose files do not certainly look as they did `before`."""
    return [u for u in utterances if not u.version or u.version != before[u.key]]


def versions_of(source: Source) -> dict[str, int]:
    """What the files of a data set look like now: a number for each key; 0 where unknown."""
    lines = (*source.rejects, *source.repeats)
    versions = {line.key: 0 for line in lines if line.key}
    versions.update((utterance.key, utterance.version) for utterance in source.utterances)
    return versions


def remembered(target: Location, fingerprint: str | None, keys: Collection[str]) -> dict[str, int]:
    """What files looked like when a set was built from them, by key; 0 where unknown.

    Args:
        target: Where the set is.
        fingerprint: Its source fingerprint.
        keys: All keys of its indexes and its rejects.jsonl.
    """
    data = b""
    # Trouble with this file is none: the contents decide.
    with contextlib.suppress(OSError, StorageError):
        most = times_size(len(keys))
        path = target / SOURCE_TIMES_NAME
        data = path.read(0, most + 1) if isinstance(path, Remote) else read_at_most(path, most)
    numbers = decode_times(data, fingerprint or "", len(keys))
    return dict(zip(sorted(keys), numbers.tolist(), strict=True))


def times_of(fingerprint: str, versions: Mapping[str, int]) -> bytes:
    """The content of source-times.npy; see `remembered`."""
    return encode_times(fingerprint, [versions[key] for key in sorted(versions)])


def differing(
    manifest: Manifest,
    target: Location,
    source: Source,
    tasks: Sequence[ShardTask],
    changed: Sequence[Utterance],
    pool: Pool,
    listener: ProgressListener,
) -> list[Utterance]:
    """Those of some utterances whose files do not hold what the finished set has stored of them.

    Args:
        manifest: Manifest of the set.
        target: Where the set is.
        source: The data set.
        tasks: Its shards, as this build would write them.
        changed: The utterances to compare.
        pool: Reads and encodes the files, as a build does.
        listener: Receives the progress.

    Raises:
        CorruptShardError: An index, rejects.jsonl or a shard of the set is damaged.
        StorageError: The disk or a store failed.
    """
    keys = {utterance.key for utterance in changed}
    files = files_at(target)
    now = read_again(tasks, keys, pool, listener)
    stored = _stored(files, manifest, keys)
    other = [utterance for utterance in changed if now[utterance.key] != stored.get(utterance.key)]
    if manifest.codec.name == "zstd":
        # Another release of zstandard may have other bytes for the same matrix.
        other = _with_other_matrices(other, files, manifest, source)
    return other


def read_again(
    tasks: Sequence[ShardTask], keys: Set[str], pool: Pool, listener: ProgressListener
) -> dict[str, tuple[float, ...] | str]:
    """Read and encode the files of some keys: what `_stored` gives, or why one is faulty."""
    records = run_shards(list(_only(tasks, keys)), check_shard, pool, listener)
    found: dict[str, tuple[float, ...] | str] = {}
    for record in records:
        found.update((reject.key, reject.reason) for reject in record.rejects)
        found.update(
            (row.key, (row.nbytes, row.frames, row.crc32, *(row.scale or ())))
            for row in record.rows
        )
    return found


def _only(tasks: Sequence[ShardTask], keys: Set[str]) -> Iterable[ShardTask]:
    """The tasks with only some of their utterances, whose faults are collected."""
    for task in tasks:
        some = tuple(u for u in task.plan.utterances if u.key in keys)
        if some:
            plan = dataclasses.replace(task.plan, utterances=some)
            yield dataclasses.replace(task, plan=plan, skip=True)


def _stored(files: Files, manifest: Manifest, keys: Set[str]) -> dict[str, Any]:
    """What a set has of some utterances, or why they were left out.

    Returns:
        By key: size, frames, crc32, and of element type uint8 minimum and step; or the reason.
    """
    found: dict[str, Any] = {
        reject.key: reject.reason
        for reject in read_rejects(files, manifest)
        if reject.repeats is None and reject.key in keys
    }
    for split in manifest.splits.values():
        rows = load_index(files, split, quantised=manifest.is_quantised)
        fields = ["key", "nbytes", "frames", "crc32"]
        fields += Scale._fields if manifest.is_quantised else ()
        columns = (rows[field].tolist() for field in fields)
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
        if not is_rounded(split.read(index), mel, manifest.dtype):
            other.append(utterance)
    return other


def remember(target: Location, times: bytes) -> str | None:
    """Write source-times.npy beside a finished set; what a user should know if that fails."""
    path = target / SOURCE_TIMES_NAME
    try:
        if isinstance(path, Remote):
            path.write(times)
        else:
            publish_bytes(path, times)
    except StorageError as error:
        return f"the next build will compare these files again: {error}"
    return None


def _sizes(target: Location, names: Iterable[str]) -> dict[str, int]:
    """Sizes of some files in a place, by name; of those that are there."""
    if isinstance(target, Remote):
        return {name: info["size"] for name, info in target.listing().items()}
    with storage_errors(target):
        present = set(os.listdir(target))
        return {name: os.stat(target / name).st_size for name in names if name in present}
