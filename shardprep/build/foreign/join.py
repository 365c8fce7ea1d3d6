"""Joins what several tars hold into the splits of one set: labels, shards, and what is left out.

Pure: the same records give the same set.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from shardprep.build.foreign.members import Dtype
from shardprep.build.foreign.scan import Found, TarRecord
from shardprep.build.foreign.tars import ForeignTar
from shardprep.build.shard import ShardRecord
from shardprep.errors import SourceError
from shardprep.format.index import NO_LABEL, IndexRow
from shardprep.format.manifest import Reject, ShardInfo, shard_name

_NUMBER = re.compile(r"-?\d{1,18}")


@dataclass
class Joined:
    """What a set of adopted tars is made of.

    Attributes:
        dtype: Element type of the matrices.
        n_mels: Their columns.
        speakers: Speaker names; the position is the label.
        records: The shards of each split, in order; tars without an utterance are left out.
        targets: The tar of each shard, by the shard's name.
        rejects: What is left out, and why.
        notes: What a user should know about the result.
    """

    dtype: Dtype
    n_mels: int
    speakers: tuple[str, ...]
    records: list[ShardRecord] = field(default_factory=list)
    targets: dict[str, str] = field(default_factory=dict)
    rejects: list[Reject] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def join(scanned: Sequence[tuple[ForeignTar, TarRecord]], speaker: str | None) -> Joined:
    """Join tars.

    Args:
        scanned: The tars, in order, each with what reading it has found.
        speaker: Field of the `.json` members that must name the speakers; None if the usual field
            may do so, or a `.cls` member.

    Raises:
        SourceError: No tar has a matrix that can be mapped, or no `.json` has the field.
    """
    shapes = Counter((found.dtype, found.n_mels) for _, r in scanned for found in r.found)
    names = _Speakers(scanned, speaker)
    none: tuple[tuple[Dtype, int], int] = (("float16", 1), 0)
    (dtype, n_mels), alike = shapes.most_common(1)[0] if shapes else none
    kept: list[tuple[ForeignTar, TarRecord, list[Found]]] = []
    rejects: list[Reject] = []
    keys: dict[tuple[str, str], str] = {}
    for tar, record in scanned:
        own: list[Found] = []
        faults = list(record.faults)
        for found in record.found:
            first = keys.setdefault((tar.split, found.key), tar.shown)
            if (found.dtype, found.n_mels) != (dtype, n_mels):
                what = f"is {found.dtype} with {found.n_mels} columns, and {alike} others are"
                faults.append((found.key, f"{what} {dtype} with {n_mels}"))
            elif first != tar.shown:
                faults.append((found.key, f"the split {tar.split} has this key in {first} too"))
            elif (fault := names.fault(tar.split, found)) is not None:
                faults.append((found.key, fault))
            else:
                own.append(found)
        split = "test" if tar.split == "test" else "labelled"
        rejects.extend(Reject(tar.shown, key, None, split, what) for key, what in faults)
        kept.append((tar, record, own))
    joined = Joined(dtype, n_mels, names.numbered(own for _, _, own in kept), rejects=rejects)
    _add_shards(joined, kept, names)
    joined.notes.extend(names.notes(joined.speakers, kept))
    return joined


def _add_shards(
    joined: Joined, kept: Sequence[tuple[ForeignTar, TarRecord, list[Found]]], names: _Speakers
) -> None:
    """Give the tars that have utterances their names as shards, and their rows of the index."""
    labels = {name: label for label, name in enumerate(joined.speakers)}
    numbers: Counter[str] = Counter()
    for split in ("train", "val", "test"):
        for tar, record, own in kept:
            if tar.split != split or not own:
                continue
            file = shard_name(split, numbers[split])
            numbers[split] += 1
            rows = tuple(
                IndexRow(f.offset, f.nbytes, f.frames, _label(labels, names.of(f)), f.crc32, f.key)
                for f in own
            )
            frames = sum(row.frames for row in rows)
            info = ShardInfo(file, len(rows), frames, record.bytes, record.sha256)
            joined.records.append(ShardRecord("", info, rows, (), record.bytes))
            joined.targets[file] = tar.path


def _label(labels: dict[str, int], name: str | None) -> int:
    return NO_LABEL if name is None else labels[name]


class _Speakers:
    """Who speaks: by the `.json` members of all utterances, or else by their `.cls` members.

    Args:
        scanned: The tars with what was found in them.
        field: The field that must name the speakers; None if the usual one may.
    """

    def __init__(self, scanned: Sequence[tuple[ForeignTar, TarRecord]], field: str | None) -> None:
        everything = [(tar.split, found) for tar, record in scanned for found in record.found]
        self._by_name = any(found.name is not None for _, found in everything)
        if field is not None and everything and not self._by_name:
            raise SourceError(
                f"no .json member has a field {field!r} that names a speaker",
                file=scanned[0][0].shown,
                remedy="Name another field with --speaker, or leave the option out.",
            )
        known = [self.of(found) is not None for split, found in everything if split != "test"]
        self._some, self._all = any(known), all(known)

    def of(self, found: Found) -> str | None:
        """The speaker of an utterance; None if unknown."""
        return found.name if self._by_name else found.number

    def fault(self, split: str, found: Found) -> str | None:
        """Why an utterance cannot be in a split whose other utterances have speakers."""
        if split == "test" or not self._some or self.of(found) is not None:
            return None
        return f"has no speaker in its {'.json' if self._by_name else '.cls'}, and others have one"

    def numbered(self, kept: Iterator[list[Found]]) -> tuple[str, ...]:
        """The speakers in the order of their labels: whole numbers by value, then names."""
        names = {name for own in kept for f in own if (name := self.of(f)) is not None}

        def place(name: str) -> tuple[bool, int, str]:
            is_number = bool(_NUMBER.fullmatch(name))
            return not is_number, int(name) if is_number else 0, name

        return tuple(sorted(names, key=place))

    def notes(
        self, speakers: tuple[str, ...], kept: Sequence[tuple[ForeignTar, TarRecord, list[Found]]]
    ) -> Iterator[str]:
        """What a user should know about the labels."""
        labels = {name: str(label) for label, name in enumerate(speakers)}
        heard: dict[str, set[str]] = {"train": set(), "val": set(), "test": set()}
        other: dict[str, str] = {}
        for tar, _, own in kept:
            for found in own:
                name = self.of(found)
                if name is not None:
                    heard[tar.split].add(name)
                    if found.number is not None and found.number != labels[name]:
                        other.setdefault(name, found.number)
        if other:
            name = min(other, key=lambda name: int(labels[name]))
            yield (
                f"the .cls members have other numbers than our labels, such as {other[name]} for "
                f"speaker {name}, whose label is {labels[name]}; the position in `speakers` of the "
                "manifest is the label"
            )
        for split in ("val", "test"):
            if heard["train"] and (missing := heard[split] - heard["train"]):
                shown = ", ".join(sorted(missing)[:5])
                more = ", ..." if len(missing) > 5 else ""
                yield f"these speakers are in {split}, but not in train: {shown}{more}"
        if not any(own for tar, _, own in kept if tar.split == "train"):
            yield "there is no train split, by the names of the tars and their folders; see --split"
        if any(own for _, _, own in kept) and not speakers:
            yield (
                "no utterance has a speaker: all labels are -1; if a field of the .json members "
                "names the speaker, give --speaker FIELD"
            )
