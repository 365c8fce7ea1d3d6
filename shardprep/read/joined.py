"""Several shard sets as one: what they must agree on, and their speakers and rows together.

The sets stand one after another, and the result is what one set of all their shards would be.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardprep.errors import FormatError
from shardprep.format.index import NO_LABEL, index_dtype
from shardprep.format.manifest import Manifest
from shardprep.storage.remote import Location, Remote


def check_alike(places: Sequence[Location], manifests: Sequence[Manifest]) -> None:
    """Make sure that sets can be read as one.

    Args:
        places: Folder or URL of each set.
        manifests: Their manifests.

    Raises:
        FormatError: There is no set; two are the same; or two differ in mel bins, element type or
            codec, or in where they lie: on this machine, or behind a URL.
    """
    if not places:
        raise FormatError("no shard set is given", remedy="Name one or several folders or URLs.")
    expected = _properties(places[0], manifests[0])
    for place, manifest in zip(places, manifests, strict=True):
        for name, (value, remedy) in _properties(place, manifest).items():
            if value != expected[name][0]:
                raise FormatError(
                    f"has {name} {value}, and {places[0]}, which is to be read as one with it, has "
                    f"{name} {expected[name][0]}",
                    file=place,
                    remedy=remedy,
                )
    first: dict[str, Location] = {}
    for place, manifest in zip(places, manifests, strict=True):
        if manifest.fingerprint in first:
            raise FormatError(
                f"is the same set as {first[manifest.fingerprint]}: each of its utterances would "
                "come twice",
                file=place,
                remedy="Name each set once. With shares= of SegmentLoader, one set comes more "
                "often than another.",
            )
        first[manifest.fingerprint] = place


def _properties(place: Location, manifest: Manifest) -> dict[str, tuple[object, str]]:
    """What sets must agree on, by name: the value, and what to do where it differs."""
    again = "Build one of the sets again with --overwrite and the {} of the other."
    codec = manifest.codec
    # The level of zstd does not matter to readers.
    chunks = f" with chunks of {codec.chunk_frames} frames" if codec.chunk_frames else ""
    return {
        "n_mels": (manifest.n_mels, "Build both sets from features with equally many mel bins."),
        "dtype": (manifest.dtype, again.format("--dtype")),
        "codec": (codec.name + chunks, again.format("--codec")),
        "files": (
            "behind a URL" if isinstance(place, Remote) else "on this machine",
            "Copy the sets that are behind URLs to this machine, or all to an object store.",
        ),
    }


def joined_fingerprint(fingerprints: Sequence[str]) -> str:
    """One fingerprint that stands for sets in this order; of one set, its own."""
    if len(fingerprints) == 1:
        return fingerprints[0]
    return hashlib.sha256("\n".join(fingerprints).encode()).hexdigest()


def joined_speakers(
    speakers: Sequence[Sequence[str]],
) -> tuple[tuple[str, ...], list[NDArray[np.int32]]]:
    """The speakers of sets, united by name.

    Args:
        speakers: Those of each set, by label.

    Returns:
        All of them: those of the first set, then those that the second one adds, in its order, and
        so on; and for each set, the number there of each of its labels (speakers of the set,).
    """
    numbers: dict[str, int] = {}
    labels = [
        np.array([numbers.setdefault(name, len(numbers)) for name in own], np.int32)
        for own in speakers
    ]
    return tuple(numbers), labels


def joined_rows(
    rows: Sequence[NDArray[Any]], shards: Sequence[int], labels: Sequence[NDArray[np.int32]]
) -> NDArray[Any]:
    """The index rows of sets, one set after another, in memory.

    Args:
        rows: Those of each set.
        shards: Number of shards of each set.
        labels: What becomes of each label of each set, see `joined_speakers`.

    Returns:
        Rows (N,), read-only, with the numbers of shards and labels of all sets together.
    """
    key_bytes = max((own.dtype["key"].itemsize for own in rows), default=1)
    quantised = any("step" in (own.dtype.names or ()) for own in rows)
    joined = np.empty(sum(map(len, rows)), index_dtype(key_bytes, quantised=quantised))
    at = shard = 0
    for own, count, mapped in zip(rows, shards, labels, strict=True):
        part = joined[at : at + len(own)]
        part[...] = own
        part["shard"] += np.uint32(shard)
        # The label -1, no speaker, takes the last value.
        part["label"] = np.append(mapped, np.int32(NO_LABEL))[own["label"]]
        at, shard = at + len(own), shard + count
    joined.flags.writeable = False
    return joined
