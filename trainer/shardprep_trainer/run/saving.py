"""Saving while a run goes on: a disk that refuses costs a checkpoint, not the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from shardprep_trainer.checkpoint.files import CheckpointFolder, State
from shardprep_trainer.errors import CheckpointError
from shardprep_trainer.run.journal import Journal


class Saver:
    """Writes the checkpoints of a run, by its main process, and warns where that fails.

    Args:
        folder: Of the run.
        journal: Takes the warnings.
        newest: The checkpoint that the run goes on from, if it does.

    Attributes:
        newest: The step checkpoint that was written last, if any.
    """

    def __init__(self, folder: CheckpointFolder, journal: Journal, newest: Path | None) -> None:
        self.folder = folder
        self.newest = newest
        self._journal = journal

    def save(self, state: State) -> bool:
        """Write a step checkpoint; returns whether it is on the disk."""

        def write() -> None:
            self.newest = self.folder.save(state, state["step"])

        return self._try(write, state["step"])

    def save_best(self, state: State) -> bool:
        """Write the best weights; returns whether they are on the disk."""
        return self._try(lambda: self.folder.save_best(state), state["step"])

    def _try(self, write: Callable[[], object], step: int) -> bool:
        try:
            write()
        except CheckpointError as error:
            newest = "none is saved yet"
            if self.newest is not None:
                newest = f"the newest that is saved is {self.newest.name}"
            self._journal.warn(
                step,
                f"step {step:,}: {error}; {newest}, training goes on, and the next save tries "
                "again",
            )
            return False
        return True
