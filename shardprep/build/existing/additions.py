"""What of a source is new to a finished set, and which place it gets there.

The new utterances are split, shuffled and cut into shards as in a build of them alone. Only the
numbers change: shards get free ones, speakers their labels in the set, test entries the positions
after those of the set. So the result is what reading both sets as one gives.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
from numpy.typing import NDArray

from shardprep.build.options import BuildOptions, options_of
from shardprep.build.plan import ShardTask, shard_tasks
from shardprep.errors import BuildError
from shardprep.format.index import NO_LABEL
from shardprep.format.manifest import Manifest, Reject, shard_name
from shardprep.read.files import files_at
from shardprep.read.joined import joined_speakers
from shardprep.read.manifest_file import load_manifest
from shardprep.read.sidecars import load_index, read_rejects
from shardprep.source.contents import Source, Utterance
from shardprep.source.dataset import repeated
from shardprep.storage.remote import Location

# The options that decide the bytes; the set's own hold for what is appended too.
_DECIDING = ("dtype", "codec", "level", "samples_per_shard", "val_fraction", "val_speakers", "seed")


class Packed(NamedTuple):
    """An utterance of a set: its split, its label and its length in frames."""

    split: str
    label: int
    frames: int


@dataclass(frozen=True)
class Held:
    """What a finished set holds.

    Attributes:
        manifest: Its manifest.
        indexes: The index rows of each split.
        lines: The lines of its rejects.jsonl.
    """

    manifest: Manifest
    indexes: Mapping[str, NDArray[Any]]
    lines: tuple[Reject, ...]

    @classmethod
    def at(cls, place: Location) -> Held:
        """What the set in a folder or behind a URL holds.

        Raises:
            FormatError: There is no complete set.
            CorruptShardError: An index or rejects.jsonl is damaged.
            StorageError: The machine cannot read it now, or the store does not answer.
        """
        manifest, files = load_manifest(place), files_at(place)
        indexes = {
            name: load_index(files, split, quantised=manifest.is_quantised)
            for name, split in manifest.splits.items()
        }
        return cls(manifest, indexes, read_rejects(files, manifest))

    @functools.cached_property
    def packed(self) -> dict[str, Packed]:
        """Every utterance in the shards, by key."""
        found = {}
        for split, rows in self.indexes.items():
            columns = (rows[name].tolist() for name in ("key", "label", "frames"))
            for key, label, frames in zip(*columns, strict=True):
                found[key.decode()] = Packed(split, label, frames)
        return found

    @functools.cached_property
    def left_out(self) -> dict[str, Reject]:
        """The lines of the utterances that are not in the shards, by key."""
        return {x.key: x for x in self.lines if x.key and x.key not in self.packed}

    @property
    def keys(self) -> Set[str]:
        """All keys of the indexes and of rejects.jsonl."""
        return self.packed.keys() | self.left_out.keys()

    def speaker_of(self, label: int) -> str | None:
        """The name of a label; None for -1."""
        return None if label == NO_LABEL else self.manifest.speakers[label]


def own_options(
    manifest: Manifest, target: Location, asked: BuildOptions, given: Set[str]
) -> BuildOptions:
    """The options for appending to a set: those that decide its bytes are its own.

    Args:
        manifest: Manifest of the set.
        target: Where it is.
        asked: What the caller has asked for.
        given: Names of options that count as asked for even if they have their default.

    Raises:
        BuildError: The set was not made by a build, or the caller has asked for other options.
    """
    if manifest.build is None or options_of(manifest).codec_info != manifest.codec:
        raise BuildError(
            "the options that this set was made with are not known: no build made it",
            file=target,
            remedy="Build the data set into a folder of its own, and open both sets together: "
            "open_shards([A, B]).",
        )
    own, default = options_of(manifest), BuildOptions()
    wanted = [n for n in _DECIDING if n in given or getattr(asked, n) != getattr(default, n)]
    other = [
        f"{name} {getattr(own, name)}, not {getattr(asked, name)}"
        for name in wanted
        if getattr(own, name) != getattr(asked, name)
    ]
    if other:
        raise BuildError(
            f"the set was built with other options ({'; '.join(other)})",
            file=target,
            remedy="Leave these options out: what is appended gets those of the set.",
        )
    skips = asked.on_error if asked.on_error == "skip" or "on_error" in given else own.on_error
    return dataclasses.replace(
        asked, on_error=skips, **{name: getattr(own, name) for name in _DECIDING}
    )


def conflicts(held: Held, source: Source) -> Iterator[tuple[Utterance, str]]:
    """Utterances of which the source says something else than the set, and what."""
    parts = [(source.labelled, ("train", "val")), (source.test, ("test",))]
    parts += [(own, (name,)) for name, own in source.fixed.items()]
    for utterances, splits in parts:
        for utterance in utterances:
            if (found := held.packed.get(utterance.key)) is None:
                continue
            speaker = held.speaker_of(found.label)
            if found.split not in splits:
                place = " or ".join(splits)
                yield utterance, f"is in {found.split} of the set, and would be in {place}"
            elif speaker != utterance.speaker:
                yield utterance, f"is of {speaker} in the set, and of {utterance.speaker} here"
            elif utterance.frames not in (0, found.frames):
                what = f"has {found.frames} frames in the set, and {utterance.frames} here"
                yield utterance, what


def additions(held: Held, source: Source, whole: Set[str]) -> Source:
    """What is new in a source, with labels and test positions as they are in the set after it.

    Args:
        held: What the set holds.
        source: The source.
        whole: Keys that the set has left out, and whose files are undamaged now.

    Returns:
        A source of the new utterances, rejects and repeats alone, and the speakers of both.
    """
    lines = {(line.split, line.file) for line in held.lines if not line.key}
    speakers, (_, labels) = joined_speakers([held.manifest.speakers, source.speakers])

    def is_new(key: str) -> bool:
        if (line := held.left_out.get(key)) is not None:
            # The position of a test entry is taken by its line.
            return key in whole and line.split != "test"
        return key not in held.packed

    def new(utterances: Iterable[Utterance]) -> tuple[Utterance, ...]:
        own = (utterance for utterance in utterances if is_new(utterance.key))
        return tuple(
            u if u.label == NO_LABEL else u._replace(label=int(labels[u.label])) for u in own
        )

    def new_lines(rejects: Iterable[Reject]) -> list[Reject]:
        return [x for x in rejects if (is_new(x.key) if x.key else (x.split, x.file) not in lines)]

    test, rejects, repeats = new(source.test), new_lines(source.rejects), new_lines(source.repeats)
    entries = [x.entry for x in test if x.entry is not None]
    entries += [x.entry for x in (*rejects, *repeats) if x.entry is not None]
    position = dict(zip(sorted(entries), _positions(held), strict=False))

    def moved(line: Reject) -> Reject:
        entry, first = (None if x is None else position[x] for x in (line.entry, line.repeats))
        reason = line.reason if first is None else repeated(first)
        return msgspec.structs.replace(line, entry=entry, repeats=first, reason=reason)

    trained, unseen = _speakers_of(held)
    labelled, fixed = new(source.labelled), {n: new(own) for n, own in source.fixed.items()}
    if later := tuple(utterance for utterance in labelled if utterance.speaker in unseen):
        fixed["val"] = (*fixed.get("val", ()), *later)
        labelled = tuple(utterance for utterance in labelled if utterance.speaker not in unseen)
    return dataclasses.replace(
        source,
        speakers=speakers,
        labelled=labelled,
        fixed=fixed,
        trained=trained,
        test=tuple(u._replace(entry=None if u.entry is None else position[u.entry]) for u in test),
        rejects=tuple(map(moved, rejects)),
        repeats=tuple(map(moved, repeats)),
    )


def _speakers_of(held: Held) -> tuple[frozenset[str], frozenset[str]]:
    """The speakers in train of a set, and those whom its build held out whole, for val."""
    found: dict[str, frozenset[str]] = {}
    for name in ("train", "val"):
        labels = {packed.label for packed in held.packed.values() if packed.split == name}
        found[name] = frozenset(held.manifest.speakers[n] for n in labels if n != NO_LABEL)
    holds_out = held.manifest.build is not None and bool(held.manifest.build.val_speakers)
    return found["train"], found["val"] - found["train"] if holds_out else frozenset()


def _positions(held: Held) -> Iterator[int]:
    """The positions of further test entries: those that neither a row nor a line has."""
    taken = {line.entry for line in held.lines if line.split == "test"}
    free = (position for position in itertools.count() if position not in taken)
    return itertools.islice(free, len(held.indexes.get("test", ())), None)


def append_tasks(held: Held, new: Source, options: BuildOptions) -> list[ShardTask]:
    """The shards of what is new, numbered after the highest number of their split in the set."""
    first = {
        name: 1 + max((number_of(shard.file) for shard in split.shards), default=-1)
        for name, split in held.manifest.splits.items()
    }

    def renamed(task: ShardTask) -> ShardTask:
        plan = task.plan
        name = shard_name(plan.split, first.get(plan.split, 0) + number_of(plan.file))
        return dataclasses.replace(task, plan=dataclasses.replace(plan, file=name))

    return [renamed(task) for task in shard_tasks(new, options)]


def number_of(file: str) -> int:
    """The number in the name of a shard."""
    return int(file.removesuffix(".tar").rpartition("-")[2])
