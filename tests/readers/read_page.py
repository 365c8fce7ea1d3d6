"""Run the code of one section of docs/readers.md on every split, and compare what it reads.

    python read_page.py SECTION

The current folder has `shards/`. Each block of shell code runs once, the first block of Python once
for each split, and the others once.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

import shardprep

PAGE = Path(__file__).parents[2] / "docs" / "readers.md"
# The one reader that has names of its own for the splits, and gives float16 as float32.
DATASETS = "Hugging Face datasets"
# What a section calls the matrix and its JSON, where the element type is uint8.
UINT8 = re.findall(r"^\| ([\w -]+) \| `(.+?)` \| `(.+?)`", PAGE.read_text(), re.MULTILINE)
(WIDENED,) = re.findall(r"^    mel = (.*about.*)$", PAGE.read_text(), re.MULTILINE)
# Key, label and matrix of each utterance that was read.
Seen = list[tuple[str, int, np.ndarray]]


def blocks(section: str, language: str) -> list[str]:
    """The blocks of code of a section of the page."""
    (text,) = (part for part in PAGE.read_text().split("\n## ") if part.startswith(f"{section}\n"))
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def widening(section: str, code: str) -> str:
    """The code of a section with the line that widens the bytes of uint8."""
    for name, mel, about in UINT8:
        if name == section:
            before, after = code.split(f"{mel})", 1)
            above, _, line = before.rpartition("\n")
            indent = line[: len(line) - len(line.lstrip())]
            widened = WIDENED.replace("mel", mel, 1)
            return f"import json\n{above}\n{indent}about = {about}\n{line}{widened}){after}"
    return code


def compare(seen: Seen, *splits: shardprep.Split, exact_type: bool = True) -> None:
    """Make sure that every utterance of the splits was read once, as it is."""
    places = {str(key): (split, i) for split in splits for i, key in enumerate(split.keys)}
    assert sorted(key for key, _, _ in seen) == sorted(places)
    for key, label, mel in seen:
        split, number = places[key]
        expected = split.read(number)
        assert label == split.labels[number], key
        assert mel.dtype == expected.dtype or not exact_type, (key, mel.dtype)
        assert np.array_equal(mel, expected), key


def run(section: str) -> None:
    """Run the code of a section, and compare."""
    shard_set = shardprep.open_shards("shards/")
    for command in blocks(section, "sh"):
        subprocess.run(command, shell=True, check=True, stdin=subprocess.DEVNULL)
    first, *others = blocks(section, "python")
    if shard_set.manifest.codec.name == "zstd":
        first = first.replace("mel.npy", "mel.npy.zst")
    if shard_set.manifest.is_quantised:
        first = widening(section, first)
    scope: dict[str, Any] = {}
    for name in shard_set.splits:
        seen: Seen = []

        def use(key: str, label: int, mel: np.ndarray, seen: Seen = seen) -> None:
            seen.append((str(key), int(label), mel))

        there = "validation" if (section, name) == (DATASETS, "val") else name
        # A data class looks its module up by this name.
        scope = {"use": use, "__name__": "__main__"}
        exec(compile(first.replace("train", there), section, "exec"), scope)
        compare(seen, shard_set[name], exact_type=section != DATASETS)
    for code in others:
        exec(compile(code, section, "exec"), scope)


if __name__ == "__main__":
    run(*sys.argv[1:])
