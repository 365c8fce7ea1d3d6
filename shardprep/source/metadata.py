"""Reads the three JSON files of a data set, within limits; a fault of such a file always raises.

metadata.json, mapping.json and testdata.json; `shardprep.source.dataset` shows their layout.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from shardprep.audio.recipe import known_recipe
from shardprep.errors import SourceError
from shardprep.format.limits import MAX_N_MELS, json_fits, most_json_bytes
from shardprep.format.manifest import MANIFEST_NAME, Features
from shardprep.source.json_text import name_of, read_object, refuse_server_error, whole_number
from shardprep.source.listing import Listing
from shardprep.source.missing import ABSENT
from shardprep.storage.remote import Location
from shardprep.storage.trouble import blames_file, storage_error

METADATA, MAPPING, TESTDATA = "metadata.json", "mapping.json", "testdata.json"

MOST_SHOWN = 300
"""Most characters of a path or of a speaker's name."""

_NUMBER, _OBJECT, _LIST = "a whole number", "an object", "a list"
_TYPES: dict[str, type | tuple[()]] = {_NUMBER: (), _OBJECT: dict, _LIST: list}
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_TOO_LARGE = "Split the data set into several, or remove from the file what is not needed."
_HOMEWORK = (
    "The folder must have the layout of the homework: metadata.json beside the .pt files; or have "
    "recordings (.wav, .flac, .mp3, ...) in folders by speaker. Of other features, name a list "
    "(.csv, .tsv, .jsonl). See `shardprep build --help`."
)


@dataclass(frozen=True)
class Metadata:
    """What the three files say; the entries of single utterances have not been checked yet.

    Attributes:
        n_mels: Mel bins F.
        speakers: Speaker name to the entries of its utterances.
        labels: Speaker name to number, by mapping.json, or in sorted order where there is none.
        test: Entries of testdata.json.
        features: How the features were made, where `shardprep features` has written them.
    """

    n_mels: int
    speakers: dict[str, list[Any]]
    labels: dict[str, int]
    test: list[Any]
    features: Features | None = None


def read_metadata(folder: Location, files: Listing) -> Metadata:
    """Read the JSON files of a data set.

    Raises:
        SourceError: A file is missing or too large, or its contents do not have the layout.
        StorageError: The machine cannot read a file now, or the store gives no answer.
    """
    metadata = _read_json(folder, files, METADATA, {"n_mels": _NUMBER, "speakers": _OBJECT})
    n_mels = _n_mels(metadata, folder / METADATA)
    labels = _labels(folder, files, metadata["speakers"])
    features = _features(metadata.get("features"))
    for speaker, entries in metadata["speakers"].items():
        if not is_unicode(speaker) or len(speaker) > MOST_SHOWN:
            raise SourceError(
                f"the name of a speaker is not valid Unicode of at most {MOST_SHOWN} characters",
                file=folder / METADATA,
                key=f"speakers.{speaker[:MOST_SHOWN]!a}",
            )
        if not isinstance(entries, list):
            raise SourceError(
                f"is {name_of(entries)}, expected a list of utterances",
                file=folder / METADATA,
                key=f"speakers.{speaker}",
            )
    if not _has(folder, files, TESTDATA):
        return Metadata(n_mels, metadata["speakers"], labels, [], features)
    testdata = _read_json(folder, files, TESTDATA, {"n_mels": _NUMBER, "utterances": _LIST})
    if _n_mels(testdata, folder / TESTDATA) != n_mels:
        raise SourceError(
            f"is {testdata['n_mels']}, but {n_mels} in {METADATA}",
            file=folder / TESTDATA,
            key="n_mels",
            remedy="Make both files of the same features, or leave testdata.json out.",
        )
    return Metadata(n_mels, metadata["speakers"], labels, testdata["utterances"], features)


def _features(found: Any) -> Features | None:
    """What metadata.json says of the features, if it is the recipe of `shardprep features`."""
    recipe = known_recipe(found if isinstance(found, dict) else None)
    return None if recipe is None else recipe.to_features()


def is_unicode(text: str) -> bool:
    """Whether a text has no lone surrogate, which JSON can spell and UTF-8 cannot."""
    return not _SURROGATE.search(text)


def _has(folder: Location, files: Listing, name: str) -> bool:
    """Whether an optional file is there. SourceError if a file says that it should be."""
    try:
        files.size(name)
    except (FileNotFoundError, NotADirectoryError):
        if (why := files.why_absent(name)) != ABSENT:
            raise SourceError(why.removeprefix("the file "), file=folder / name) from None
        return False
    except (OSError, ValueError):
        # Reading the file says what is wrong.
        return True
    return True


def _read_json(
    folder: Location, files: Listing, name: str, expected: dict[str, str]
) -> dict[str, Any]:
    """The object in a file. SourceError if it lacks an expected key, or has another type there."""
    path = folder / name
    try:
        data = _read_in_proportion(files, name)
        if data is None:
            raise SourceError("is larger than its files account for", file=path, remedy=_TOO_LARGE)
        content = read_object(data)
        if not content.keys() & expected.keys():
            refuse_server_error(content)
    except FileNotFoundError:
        raise _absent(folder, files, name) from None
    except OSError as error:
        if not blames_file(error):
            raise storage_error(error, path, "cannot be read") from error
        raise SourceError(f"cannot be read: {error.strerror}", file=path) from None
    except ValueError as error:
        raise SourceError(str(error), file=path) from None
    for key, kind in expected.items():
        if key not in content:
            raise SourceError(f"is missing, expected {kind}", file=path, key=key, remedy=_HOMEWORK)
        number = whole_number(content[key])
        if kind == _NUMBER and number is not None:
            content[key] = number
        elif not isinstance(content[key], _TYPES[kind]):
            found = name_of(content[key])
            raise SourceError(f"is {found}, expected {kind}", file=path, key=key)
    return content


def _absent(folder: Location, files: Listing, name: str) -> SourceError:
    """The error that a necessary file is not there, with what the folder is instead."""
    why, remedy = files.why_absent(name).removeprefix("the file "), _HOMEWORK
    inner = next((other for other in files.folders() if _is_there(files, f"{other}/{name}")), None)
    if inner is not None:
        remedy = f"Name {folder / inner}, which has one."
    elif _is_there(files, MANIFEST_NAME):
        remedy = (
            f"{folder} seems to be a shard set: name the data set first, as in "
            "`shardprep build Dataset/ shards/`."
        )
    return SourceError(why, file=folder / name, remedy=remedy)


def _is_there(files: Listing, name: str) -> bool:
    try:
        files.size(name)
    except (OSError, ValueError):
        return False
    return True


def _read_in_proportion(files: Listing, name: str) -> bytes | None:
    """The bytes of a JSON file; None if it is too large for the number of files in the folder."""
    size = files.size(name)
    if size <= most_json_bytes(0):
        data = files.read(name, most_json_bytes(0))
        if json_fits(data, 0):
            return data
    # To count takes a while, but only a large data set comes here.
    count = files.count()
    if size > most_json_bytes(count):
        return None
    data = files.read(name, most_json_bytes(count))
    return data if json_fits(data, count) else None


def _n_mels(content: dict[str, Any], path: Location) -> int:
    n_mels: int = content["n_mels"]
    if not 1 <= n_mels <= MAX_N_MELS:
        raise SourceError(f"is {n_mels}, expected 1 to {MAX_N_MELS}", file=path, key="n_mels")
    return n_mels


def _labels(folder: Location, files: Listing, speakers: dict[str, Any]) -> dict[str, int]:
    path = folder / MAPPING
    if not _has(folder, files, MAPPING):
        return {name: number for number, name in enumerate(sorted(speakers))}
    mapping = _read_json(folder, files, MAPPING, {"speaker2id": _OBJECT})
    found = mapping["speaker2id"]
    labels = {
        name: n if (n := whole_number(value)) is not None else value
        for name, value in found.items()
    }
    for fault in _mapping_faults(labels, mapping.get("id2speaker")):
        raise SourceError(
            fault,
            file=path,
            remedy="Correct it, or remove it to number the speakers in sorted order.",
        )
    return labels


def _mapping_faults(labels: dict[str, Any], names: Any) -> Iterator[str]:
    numbers = list(labels.values())
    if not all(map(is_unicode, labels)):
        yield "speaker2id has a name that is not valid Unicode"
    elif odd := [number for number in numbers if type(number) is not int]:
        yield f"speaker2id has {name_of(odd[0])} where a whole number is expected"
    elif sorted(numbers) != list(range(len(numbers))):
        yield f"speaker2id does not number its {len(numbers)} speakers 0 to {len(numbers) - 1}"
    elif names is not None and names != {str(n): name for name, n in labels.items()}:
        yield "id2speaker is not the reverse of speaker2id"
