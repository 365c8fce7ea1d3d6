"""trainer/train.py with a loader that notes what it delivers; `test_multinode.py` launches it.

    torchrun ... recording_train.py FOLDER [OPTION ...]

Each process writes a file into FOLDER: a line for every batch, when the loop takes it. A process
that is on its own takes its time over each, so that another can join before the run ends.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

import shardprep
from shardprep_trainer.run import data
from shardprep_trainer.train import main

ALONE_SECONDS = 0.3


class RecordingLoader(shardprep.SegmentLoader):
    """Notes where it stands and the digests of the segments, of every batch."""

    folder: Path

    def __init__(self, split: shardprep.Split, **options: Any) -> None:
        super().__init__(split, **options)
        self._place = {key: options[key] for key in ("rank", "world_size")}
        self._began = time.time_ns()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        # Every start chooses a new port.
        start = {"start": os.environ["MASTER_PORT"], "began": self._began, **self._place}
        path = self.folder / f"{self._began}-{os.getpid()}.jsonl"
        for batch in super().__iter__():
            state = self.state_dict()
            at = {key: state[key] for key in ("epoch", "position")}
            segments = [
                hashlib.md5(segment.numpy().tobytes()).hexdigest() for segment in batch["mel"]
            ]
            with path.open("a") as file:
                file.write(json.dumps({**start, **at, "segments": segments}) + "\n")
            if self._place["world_size"] == 1:
                time.sleep(ALONE_SECONDS)
            yield batch


if __name__ == "__main__":
    RecordingLoader.folder = Path(sys.argv[1])
    data.SegmentLoader = RecordingLoader
    sys.exit(main(sys.argv[2:]))
