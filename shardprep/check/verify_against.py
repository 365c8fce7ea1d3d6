"""Compare a shard set with the data set that it was built from."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from shardprep.check.report import Fault
from shardprep.errors import CorruptShardError
from shardprep.format.manifest import Manifest
from shardprep.read.files import Files, Origin
from shardprep.read.sidecars import read_rejects
from shardprep.read.split import Split
from shardprep.source.contents import Matrix, Source, Utterance


def originals_of(
    source: Source | None, split: Split, indices: np.ndarray
) -> Iterator[tuple[Utterance, Matrix] | None]:
    """What the data set has of each utterance, None where it does not have the utterance."""
    if source is None:
        yield from itertools.repeat(None)
        return
    known = [source.by_key.get(str(split.keys[index])) for index in indices]
    present = [utterance for utterance in known if utterance is not None]
    matrices = source.reader.read(present, source.n_mels)
    for utterance in known:
        yield None if utterance is None else next(matrices)


def source_faults(
    file: str,
    split: Split,
    index: int,
    mel: np.ndarray,
    source: Source,
    original: tuple[Utterance, Matrix] | None,
) -> Iterator[Fault]:
    """Differences of an utterance, read as `mel`, from its original in the data set."""
    key = str(split.keys[index])
    if original is None:
        yield Fault(file, key, f"is not an utterance of {source.root}")
        return
    utterance, original_mel = original
    if utterance.label != int(split.labels[index]):
        yield Fault(
            file, key, f"its label is {split.labels[index]}, the source's {utterance.label}"
        )
    if isinstance(original_mel, ValueError):
        yield Fault(file, key, f"the source file {utterance.path} {original_mel}")
        return
    with np.errstate(over="ignore"):
        expected = original_mel.astype(split.dtype)
    if not np.array_equal(expected, mel):
        yield Fault(file, key, f"differs from the source file {utterance.path}")


def missing_faults(files: Files, manifest: Manifest, source: Source) -> Iterator[Fault]:
    """Utterances of the data set that are neither in the shards nor among the rejects."""
    packed: set[str] = set()
    for name in manifest.splits:
        try:
            packed.update(map(str, Split(name, [Origin(files, manifest)]).keys))
        except CorruptShardError:
            return
    try:
        packed.update(reject.key for reject in read_rejects(files, manifest))
    except CorruptShardError:
        # This fault of the file is reported already; nobody knows what the file listed.
        return
    for key, utterance in source.by_key.items():
        if key not in packed:
            yield Fault(str(source.root / utterance.path), key, "is not in the set")
