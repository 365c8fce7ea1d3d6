"""Compare a shard set with the data set that it was built from, or with all that it was made of."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np

from shardprep.audio.recipe import FeatureRecipe
from shardprep.check.report import Fault
from shardprep.errors import CorruptShardError
from shardprep.format.index import NO_LABEL
from shardprep.format.manifest import Manifest
from shardprep.format.quantised import is_rounded
from shardprep.read.files import Files, Origin
from shardprep.read.sidecars import read_rejects
from shardprep.read.split import Split
from shardprep.source.contents import Matrix, Source, Utterance
from shardprep.source.scan import scan_source

Against: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None
"""A data set, or all that a set was made of, in a list."""


def sources_at(
    against: Against, follow_links: bool, recipe: FeatureRecipe | None = None
) -> list[Source]:
    """The data sets that a caller has named.

    Args:
        against: What the caller has named.
        follow_links: Whether files may be links out of them.
        recipe: That of the set, where it is known: recordings are compared by it.

    Raises:
        SourceError: One is none.
    """
    if against is None:
        return []
    places = [against] if isinstance(against, (str, os.PathLike)) else against
    return [scan_source(place, follow_links=follow_links, recipe=recipe) for place in places]


def originals_of(
    sources: Sequence[Source], split: Split, indices: np.ndarray
) -> Iterator[tuple[Utterance, Matrix] | None]:
    """What the first data set that has an utterance has of it, None where none has it."""
    keys = [str(split.keys[index]) for index in indices]
    owners = [next((s for s in sources if key in s.by_key), None) for key in keys]
    matrices = {}
    for source in sources:
        own = [source.by_key[k] for k, owner in zip(keys, owners, strict=True) if owner is source]
        matrices[id(source)] = source.reader.read(own, source.n_mels)
    for owner in owners:
        yield None if owner is None else next(matrices[id(owner)])


def source_faults(
    file: str,
    split: Split,
    index: int,
    mel: np.ndarray,
    speakers: Sequence[str],
    original: tuple[Utterance, Matrix],
) -> Iterator[Fault]:
    """Differences of an utterance, read as `mel`, from its original in a data set."""
    key, label = str(split.keys[index]), int(split.labels[index])
    utterance, original_mel = original
    speaker = None if label == NO_LABEL else speakers[label]
    wanted = None if utterance.label == NO_LABEL else utterance.speaker
    if speaker != wanted:
        yield Fault(file, key, f"its label is {label} ({speaker}), the source's speaker {wanted}")
    if isinstance(original_mel, ValueError):
        yield Fault(file, key, f"the source file {utterance.path} {original_mel}")
        return
    if not is_rounded(mel, original_mel, split.stored_dtype.name):
        yield Fault(file, key, f"differs from the source file {utterance.path}")


def unknown_fault(file: str, keys: Sequence[str], sources: Sequence[Source]) -> Iterator[Fault]:
    """The utterances of a shard that no data set has: one fault, as there may be many."""
    if keys:
        more = f" (and {len(keys) - 1} more of this shard)" if keys[1:] else ""
        places = " or ".join(str(source.root) for source in sources)
        remedy = "; if other data sets were appended, name them too"
        yield Fault(file, keys[0], f"is not an utterance of {places}{more}{remedy}")


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
