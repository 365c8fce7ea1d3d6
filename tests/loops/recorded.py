"""What a training loop saw, noted by its processes and read by the tests.

Frame t of utterance i holds (i, t, 0, ...), so a segment says which utterance it is, and where in
it it begins.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

import shardprep

BATCH = 4
FRAMES = 8
# One segment: its utterance, and its first frame.
Segment = tuple[int, int]


def loader(shards: str | Path, **options: Any) -> shardprep.SegmentLoader:
    """The loader of every loop here; it finds its rank by itself."""
    split = shardprep.open_shards(shards)["train"]
    chosen = {"batch_size": BATCH, "segment_frames": FRAMES, **options}
    return shardprep.SegmentLoader(split, **chosen)


def segments(batch: dict[str, Tensor]) -> list[Segment]:
    """The segments of a batch."""
    first = batch["mel"][:, 0, :2].int().tolist()
    return [(utterance, frame) for utterance, frame in first]


class Record:
    """Notes batches, one after another, in a file for each process.

    Args:
        folder: Where the files are.
        name: Of the loop.
        rank: This process's number.
    """

    def __init__(self, folder: str | Path, name: str, rank: int) -> None:
        self.path = Path(folder) / f"{name}.{rank}.jsonl"
        self.path.write_text("")

    def add(self, batch: dict[str, Tensor]) -> None:
        """Note a batch that the loop takes a step with."""
        with self.path.open("a") as file:
            file.write(json.dumps(segments(batch)) + "\n")


def read(folder: Path, name: str, ranks: int) -> list[list[Segment]]:
    """The batches of all ranks together, in order."""
    parts = [
        [
            [(utterance, frame) for utterance, frame in json.loads(line)]
            for line in (folder / f"{name}.{rank}.jsonl").read_text().splitlines()
        ]
        for rank in range(ranks)
    ]
    assert len(list(folder.glob(f"{name}.*.jsonl"))) == ranks
    return [sum(batches, []) for batches in zip(*parts, strict=True)]


def each_act(perform: Callable[[str, str, str], None]) -> None:
    """Perform what a loop's script is told: shards, a folder for the record, and some acts."""
    shards, out, *acts = sys.argv[1:]
    for act in acts:
        perform(shards, out, act)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # A thread of gloo sometimes aborts a process whose interpreter cleans up.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def rank() -> int:
    """This process's number, as a launcher gives it."""
    return int(os.environ.get("RANK", "0"))
