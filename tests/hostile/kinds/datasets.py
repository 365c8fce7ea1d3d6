"""The JSON files of a data set, and the paths in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forge import (
    holes,
    pipe,
    set_entry,
)

from kinds.registry import GB, kind, register


def metadata(
    name: str, sentence: str, change: Callable[[str], str], file: str = "metadata"
) -> None:
    def make(folder: Path) -> None:
        path = folder / f"{file}.json"
        path.write_text(change(path.read_text() if path.exists() else ""))

    register(name, sentence, make, "dataset")


def entry(name: str, sentence: str, /, **values: Any) -> None:
    register(name, sentence, lambda folder: set_entry(folder, **values), "dataset")


FIRST = '{"feature_path": "uttr-0.pt", "mel_len": 70}'
metadata("metadata_nested", "metadata.json nests lists 200,000 deep", lambda text: "[" * 200_000)
metadata(
    "metadata_entry_nested",
    "an utterance in metadata.json is a list, nested 900 deep",
    lambda text: text.replace(FIRST, "[" * 900 + "]" * 900),
)
metadata(
    "metadata_number_of_5000_digits",
    "metadata.json has a number of 5,000 digits",
    lambda text: text.replace("70}", "7" * 5000 + "}"),
)
metadata("metadata_number_1e400", "mel_len is 1e400", lambda text: text.replace("70}", "1e400}"))
metadata(
    "metadata_duplicate_keys",
    "a speaker occurs twice in metadata.json",
    lambda text: text.replace('"id1"', '"id0"'),
)
metadata(
    "metadata_of_many_values",
    "metadata.json is a list of ten million lists",
    lambda text: '{"n_mels": 5, "speakers": {"a": [' + "[]," * 10_000_000 + "[]]}}",
)
metadata(
    "metadata_of_faulty_entries",
    "metadata.json lists a million entries that are not utterances",
    lambda text: '{"n_mels": 5, "speakers": {"a": [' + "1," * 1_000_000 + "1]}}",
)
metadata(
    "metadata_one_file_often",
    "metadata.json lists one file 390,000 times",
    lambda text: text.replace(FIRST, (FIRST + ",") * 390_000 + FIRST),
)
metadata(
    "metadata_long_name",
    "the name of a speaker has 20 million characters",
    lambda text: text.replace("id0", "a" * 20_000_000),
)
metadata(
    "metadata_wide_characters",
    "metadata.json is 30 MB of characters that take four bytes each",
    lambda text: text.replace("id0", "\U0001f600" * 7_500_000),
)
metadata(
    "mapping_of_numbers",
    "mapping.json numbers speakers from 2^70",
    lambda text: json.dumps({"speaker2id": {"id0": 2**70, "id1": -(2**70)}}),
    "mapping",
)
entry("path_parent_folder", "a path is ../outside/secret.pt", feature_path="../outside/secret.pt")
entry("path_absolute", "a path is /etc/passwd.pt", feature_path="/etc/passwd.pt")
entry("path_with_nul", "a path has a zero byte", feature_path="uttr-0\0.pt")
entry("path_of_20_mb", "a path has 20 million characters", feature_path="a" * 20_000_000 + ".pt")
entry(
    "path_with_backslashes",
    "a path leads to ../outside/secret.pt with backslashes",
    feature_path="..\\outside\\secret.pt",
)
entry(
    "path_with_backslashes_and_slashes",
    "a path leads inside where a backslash parts folders, and outside where it does not",
    feature_path="a\\b/../../outside/secret.pt",
)
entry("mel_len_of_2_40", "mel_len is 2^40", mel_len=2**40)


@kind("dataset")
def metadata_of_10_gb(folder: Path) -> None:
    """metadata.json is 10 GB long"""
    holes(folder / "metadata.json", 10 * GB)


@kind("dataset")
def metadata_pipe(folder: Path) -> None:
    """metadata.json is a named pipe"""
    pipe(folder / "metadata.json")


@kind("dataset")
def mapping_device(folder: Path) -> None:
    """mapping.json leads to a device that never ends"""
    (folder / "mapping.json").symlink_to("/dev/zero")


@kind("dataset")
def link_outside(folder: Path) -> None:
    """a .pt file is a symbolic link out of the data set"""
    (folder / "uttr-0.pt").rename(folder.parent / "outside" / "real.pt")
    (folder / "uttr-0.pt").symlink_to(folder.parent / "outside" / "real.pt")


@kind("dataset")
def metadata_link_outside(folder: Path) -> None:
    """metadata.json is a symbolic link out of the data set"""
    (folder / "metadata.json").rename(folder.parent / "outside" / "metadata.json")
    (folder / "metadata.json").symlink_to(folder.parent / "outside" / "metadata.json")


@kind("dataset")
def pt_pipe(folder: Path) -> None:
    """a .pt file is a named pipe"""
    pipe(folder / "uttr-0.pt")


@kind("dataset")
def pt_folder(folder: Path) -> None:
    """a .pt file is a folder"""
    (folder / "uttr-0.pt").unlink()
    (folder / "uttr-0.pt").mkdir()
