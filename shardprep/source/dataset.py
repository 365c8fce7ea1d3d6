"""What a folder in the homework's layout holds, checked before anything is written.

    Dataset/
      metadata.json   {"n_mels": 40, "speakers": {"id00464": [{"feature_path", "mel_len"}]}}
      mapping.json    {"speaker2id": {"id00464": 0}, "id2speaker": {"0": "id00464"}}; optional
      testdata.json   {"n_mels": 40, "utterances": [{"feature_path", "mel_len"}]}; optional
      uttr-*.pt       float32 tensors (mel_len, n_mels)

A fault of a whole file (no metadata.json, broken JSON) always raises. A fault of one utterance
becomes a `Reject`, and the caller decides whether it stops the build.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import msgspec

from shardprep.errors import SourceError
from shardprep.format.index import MAX_KEY_BYTES, NO_LABEL
from shardprep.format.limits import (
    MAX_N_MELS,
    json_fits,
    most_json_bytes,
)
from shardprep.format.manifest import Reject
from shardprep.source.listing import SourceFiles, source_files
from shardprep.storage.remote import Location, locate

METADATA, MAPPING, TESTDATA = "metadata.json", "mapping.json", "testdata.json"

# Characters of a path or of a speaker's name; files of a repeated one in a reason; rejects, of
# which a data set that is worth packing has few.
_MOST_SHOWN = 300
_MOST_LISTED = 10
_MOST_REJECTS = 100_000

_SURROGATE = re.compile(r"[\ud800-\udfff]")
_BAD_CHARACTERS = re.compile(r"[\x00-\x1f\x7f]")
_TOO_LARGE = "Split the data set into several, or leave out of the file what is not needed."
_MEND = "Mend the data set, or leave such utterances out with --on-error skip."
_HOMEWORK = "The folder must have the layout of the homework: metadata.json beside the .pt files."


class Utterance(NamedTuple):
    """One `.pt` file: its key in the shards and what the metadata say about it.

    Attributes:
        key: File path without ".pt"; names the sample in the shards.
        path: File path relative to the data set, with forward slashes.
        speaker: Speaker name, or None where unknown.
        label: Speaker number, or -1.
        frames: Length in mel frames.
        nbytes: Size of the file in bytes.
        mtime_ns: Its time of modification; tells a later resume that the file has changed.
    """

    key: str
    path: str
    speaker: str | None
    label: int
    frames: int
    nbytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Source:
    """The contents of a data set.

    Attributes:
        root: Its folder, or the URL of that.
        n_mels: Mel bins F.
        speakers: Speaker names; the position is the label.
        labelled: Utterances of metadata.json.
        test: Utterances of testdata.json, in its order.
        rejects: Utterances that cannot be packed.
    """

    root: Location
    n_mels: int
    speakers: tuple[str, ...]
    labelled: tuple[Utterance, ...]
    test: tuple[Utterance, ...]
    rejects: tuple[Reject, ...]

    @functools.cached_property
    def by_key(self) -> dict[str, Utterance]:
        """Every utterance that can be packed, by its key."""
        return {utterance.key: utterance for utterance in (*self.labelled, *self.test)}

    @property
    def fingerprint(self) -> str:
        """SHA-256 over speakers, utterances, lengths and file sizes."""
        rows = [[*utterance[:-1]] for utterance in (*self.labelled, *self.test)]
        listed = [self.n_mels, self.speakers, rows, [msgspec.to_builtins(r) for r in self.rejects]]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


class _Entry(msgspec.Struct):
    feature_path: str
    mel_len: int


@dataclass
class _Scan:
    """Utterances and rejects as they are found."""

    root: Location
    files: SourceFiles
    uses: Counter[str] = field(default_factory=Counter)
    found: dict[str, list[Utterance]] = field(default_factory=lambda: {"labelled": [], "test": []})
    rejects: list[Reject] = field(default_factory=list)

    def add(self, raw: Any, split: str, speaker: str | None, label: int) -> None:
        path = raw.get("feature_path") if isinstance(raw, dict) else None
        shown = path[:_MOST_SHOWN] if isinstance(path, str) else _shown(raw)
        key = ""
        try:
            entry = msgspec.convert(raw, _Entry)
            relative = _inside(entry.feature_path)
            key = _key_of(relative)
            if speaker is not None and label == NO_LABEL:
                raise ValueError(f"speaker {speaker} is not in {MAPPING}")
            if entry.mel_len < 1:
                raise ValueError(f"mel_len is {entry.mel_len}, expected at least 1")
            state = self.files.look(relative)
        except (msgspec.ValidationError, ValueError) as error:
            # A lone surrogate, which JSON can spell, has no place in rejects.jsonl.
            shown = shown.encode(errors="backslashreplace").decode()
            self._reject(Reject(shown, key, speaker, split, str(error)))
            return
        self.uses[key] += 1
        if self.uses[key] > _MOST_REJECTS:
            raise SourceError(
                f"is listed more than {_MOST_REJECTS} times", file=self.root / relative
            )
        self.found[split].append(Utterance(key, relative, speaker, label, entry.mel_len, *state))

    def _reject(self, reject: Reject) -> None:
        self.rejects.append(reject)
        if len(self.rejects) > _MOST_REJECTS:
            error = source_error(self.rejects[0], self.root)
            error.what += f" (and {_MOST_REJECTS} more utterances are faulty)"
            raise error

    def drop_repeated(self) -> None:
        """Reject every use of a file that is listed more than once: its label is in doubt."""
        labels: dict[str, list[str]] = {}
        for split, utterances in self.found.items():
            for utterance in utterances:
                if self.uses[utterance.key] > 1:
                    labels.setdefault(utterance.key, []).append(utterance.speaker or split)
        for split, utterances in self.found.items():
            for utterance in utterances:
                if utterance.key in labels:
                    listed = ", ".join(labels[utterance.key][:_MOST_LISTED])
                    reason = f"the same file is listed {self.uses[utterance.key]} times: {listed}"
                    self._reject(
                        Reject(utterance.path, utterance.key, utterance.speaker, split, reason)
                    )
            self.found[split] = [u for u in utterances if u.key not in labels]


def source_error(reject: Reject, root: Location, remedy: str = _MEND) -> SourceError:
    """The error for an utterance that may not be left out, as under --on-error fail."""
    return SourceError(
        reject.reason,
        file=root / reject.file,
        key=f"speaker {reject.speaker}" if reject.speaker else None,
        remedy=remedy,
    )


def scan_dataset(root: str | os.PathLike[str]) -> Source:
    """Read the three JSON files of a data set and look at every file that they name.

    Args:
        root: The data set's folder, or its URL.

    Returns:
        What was found. The `.pt` files are not opened; see `shardprep.source.features`.

    Raises:
        SourceError: The folder or one of the JSON files is not as it should be.
        StorageError: The store behind the URL gives no answer.
    """
    folder = locate(root)
    files = source_files(folder)
    metadata = _read_json(folder, files, METADATA, {"n_mels": int, "speakers": dict})
    n_mels = _n_mels(metadata, folder / METADATA)
    labels = _labels(folder, files, metadata["speakers"])
    testdata = None
    if _has(files, TESTDATA):
        testdata = _read_json(folder, files, TESTDATA, {"n_mels": int, "utterances": list})
    files.expect(_paths(metadata["speakers"].values(), testdata))
    scan = _Scan(folder, files)
    for speaker, entries in metadata["speakers"].items():
        if not _is_unicode(speaker) or len(speaker) > _MOST_SHOWN:
            raise SourceError(
                f"the name of a speaker is not valid Unicode of at most {_MOST_SHOWN} characters",
                file=folder / METADATA,
                key=f"speakers.{speaker[:_MOST_SHOWN]!a}",
            )
        if not isinstance(entries, list):
            raise SourceError("is not a list", file=folder / METADATA, key=f"speakers.{speaker}")
        for entry in entries:
            scan.add(entry, "labelled", speaker, labels.get(speaker, NO_LABEL))
    if testdata is not None:
        if _n_mels(testdata, folder / TESTDATA) != n_mels:
            raise SourceError(
                f"is {testdata['n_mels']}, but {n_mels} in {METADATA}",
                file=folder / TESTDATA,
                key="n_mels",
            )
        for entry in testdata["utterances"]:
            scan.add(entry, "test", None, NO_LABEL)
    scan.drop_repeated()
    return Source(
        folder,
        n_mels,
        tuple(sorted(labels, key=lambda name: labels[name])),
        tuple(scan.found["labelled"]),
        tuple(scan.found["test"]),
        tuple(scan.rejects),
    )


def _shown(raw: Any) -> str:
    """What stands in the place of a path, cut short."""
    try:
        return json.dumps(raw)[:200]
    except RecursionError:
        return type(raw).__name__


def _inside(path: str) -> str:
    if len(path) > _MOST_SHOWN:
        raise ValueError(f"the path has {len(path)} characters, expected at most {_MOST_SHOWN}")
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path:
        raise ValueError("the path leads outside the data set")
    return str(pure)


def _key_of(relative: str) -> str:
    if not relative.endswith(".pt"):
        raise ValueError("the file name does not end in .pt")
    key = relative.removesuffix(".pt")
    if "." in key:
        raise ValueError(f"the key {key!r} contains a dot, where tar readers cut names")
    if _BAD_CHARACTERS.search(key) or any(part.startswith("__") for part in key.split("/")):
        raise ValueError(f"the key {key!r} has characters that tar readers do not take")
    if not _is_unicode(key):
        raise ValueError("the file name is not valid Unicode")
    size = len(key.encode())
    if not key.split("/")[-1] or size > MAX_KEY_BYTES:
        raise ValueError(f"the key {key!r} has {size} bytes, expected 1 to {MAX_KEY_BYTES}")
    return key


def _is_unicode(text: str) -> bool:
    return not _SURROGATE.search(text)


def _has(files: SourceFiles, name: str) -> bool:
    try:
        files.size(name)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        # Reading it says what is wrong.
        return True
    return True


def _paths(speakers: Iterable[Any], testdata: dict[str, Any] | None) -> Iterator[str]:
    """Paths of all files that are listed, as far as they can be."""
    for entries in (*speakers, testdata["utterances"] if testdata else []):
        for entry in entries if isinstance(entries, list) else []:
            path = entry.get("feature_path") if isinstance(entry, dict) else None
            with contextlib.suppress(ValueError):
                if isinstance(path, str):
                    yield _inside(path)


def _read_json(
    folder: Location, files: SourceFiles, name: str, expected: dict[str, type]
) -> dict[str, Any]:
    path = folder / name
    try:
        data = _read_in_proportion(files, name)
        if data is None:
            raise SourceError("is larger than its files account for", file=path, remedy=_TOO_LARGE)
        content = json.loads(data, object_pairs_hook=_no_duplicates)
    except FileNotFoundError:
        raise SourceError("does not exist", file=path, remedy=_HOMEWORK) from None
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}", file=path) from None
    except (ValueError, RecursionError) as error:
        raise SourceError(f"is not valid JSON: {error}", file=path) from None
    if not isinstance(content, dict):
        raise SourceError("is not a JSON object", file=path, remedy=_HOMEWORK)
    for key, kind in expected.items():
        if not isinstance(content.get(key), kind) or isinstance(content[key], bool):
            found = type(content.get(key)).__name__ if key in content else "nothing"
            raise SourceError(f"expected {kind.__name__}, found {found}", file=path, key=key)
    return content


def _read_in_proportion(files: SourceFiles, name: str) -> bytes | None:
    """The bytes of a JSON file, None if it has more than the files of its folder account for."""
    size = files.size(name)
    if size <= most_json_bytes(0):
        data = files.read(name, most_json_bytes(0))
        if json_fits(data, 0):
            return data
    # Counting takes a while, but only a large data set comes here.
    count = files.count()
    if size > most_json_bytes(count):
        return None
    data = files.read(name, most_json_bytes(count))
    return data if json_fits(data, count) else None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(name for name, count in Counter(n for n, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice[:_MOST_SHOWN]!r} occurs twice in one object")
    return content


def _n_mels(content: dict[str, Any], path: Location) -> int:
    n_mels = int(content["n_mels"])
    if not 1 <= n_mels <= MAX_N_MELS:
        raise SourceError(f"is {n_mels}, expected 1 to {MAX_N_MELS}", file=path, key="n_mels")
    return n_mels


def _labels(folder: Location, files: SourceFiles, speakers: dict[str, Any]) -> dict[str, int]:
    """Speaker name to number: by mapping.json, or in sorted order where there is none."""
    path = folder / MAPPING
    if not _has(files, MAPPING):
        return {name: number for number, name in enumerate(sorted(speakers))}
    mapping = _read_json(folder, files, MAPPING, {"speaker2id": dict})
    labels: dict[str, int] = mapping["speaker2id"]
    for fault in _mapping_faults(labels, mapping.get("id2speaker")):
        raise SourceError(fault, file=path, remedy="Mend it, or remove it to number speakers anew.")
    return labels


def _mapping_faults(labels: dict[str, Any], names: Any) -> Iterator[str]:
    numbers = list(labels.values())
    if not all(map(_is_unicode, labels)):
        yield "speaker2id has a name that is not valid Unicode"
    elif any(type(number) is not int for number in numbers):
        yield "speaker2id has a number that is not an integer"
    elif sorted(numbers) != list(range(len(numbers))):
        yield f"speaker2id does not number its {len(numbers)} speakers 0 to {len(numbers) - 1}"
    elif names is not None and names != {str(n): name for name, n in labels.items()}:
        yield "id2speaker is not the reverse of speaker2id"
