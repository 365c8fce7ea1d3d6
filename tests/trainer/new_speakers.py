"""A set whose split val has speakers whom train lacks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import shardprep

# Utterances of each speaker in train and in val; strangers stand between the others.
COUNTS = {"a": (8, 2), "b": (0, 4), "c": (8, 2), "d": (0, 3), "e": (8, 0)}


def write_set(folder: Path, counts: dict[str, tuple[int, int]] = COUNTS) -> Path:
    """Write a set of such counts; the speakers differ in their level."""
    rng = np.random.default_rng(0)
    with shardprep.ShardWriter(folder, 40, dtype="float32", workers=1) as writer:
        for level, (name, amounts) in enumerate(counts.items()):
            for split, amount in zip(("train", "val"), amounts, strict=True):
                for number in range(amount):
                    mel = rng.normal(level, 2.0, (30 + 7 * number, 40)).astype(np.float32)
                    writer.add(f"{name}/{split}/{number}", mel, name, split)  # type: ignore[arg-type]
    return folder
