"""Checkpoints on disk: written whole or not at all, read without running pickled code.

    RUN/checkpoints/step-00002000.pt   all that continuing takes: weights, optimiser, position, ...
    RUN/checkpoints/best.pt            a copy of the weights at the best validation accuracy

A final name appears only by rename, after the bytes are on the disk, so that a kill at any moment
leaves the previous checkpoint in place.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from shardprep import StorageError, publish
from trainer.errors import CheckpointError

State = dict[str, Any]

FORMAT = 1
_STEP_NAME = re.compile(r"step-(\d{8,})\.pt")


def load(path: Path, needs: Iterable[str] = ()) -> State:
    """Read a checkpoint onto the CPU, with `weights_only=True`.

    Args:
        path: The file.
        needs: Entries that it must have.

    Raises:
        CheckpointError: The file is missing, damaged, of another format version, or lacks an
            entry.
    """
    try:
        # PyTorch writes checksums but does not compare them when it reads.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"the checksum of {damaged} does not match")
        state: State = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: there is no such checkpoint; `ls {path.parent}` shows those there are"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    # A damaged pickle can raise nearly anything.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(
            f"{path}: not a whole checkpoint ({reason}); if it is one of a run, delete it to "
            "fall back on the one before it"
        ) from error
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise CheckpointError(
            f"{path}: checkpoint format {found} found, {FORMAT} expected; use the version of "
            "trainer that wrote it"
        )
    if missing := [name for name in needs if name not in state]:
        raise CheckpointError(
            f"{path}: holds no {', '.join(missing)}; take a step-*.pt, which best.pt is not, from "
            "this version of trainer"
        )
    return state


class CheckpointFolder:
    """The `checkpoints/` folder of a run.

    Args:
        run: The run folder.
        keep: Step checkpoints kept, newest first, at least 1.
    """

    def __init__(self, run: Path, keep: int = 1) -> None:
        assert keep >= 1
        self.folder = run / "checkpoints"
        self.keep = keep

    @property
    def best(self) -> Path:
        """Where the weights at the best validation accuracy are, once there are any."""
        return self.folder / "best.pt"

    def steps(self) -> list[Path]:
        """The step checkpoints, oldest first."""
        found = [path for path in self.folder.glob("step-*.pt") if _STEP_NAME.fullmatch(path.name)]
        return sorted(found, key=_step_of)

    def latest(self) -> Path | None:
        """The newest step checkpoint, or None."""
        found = self.steps()
        return found[-1] if found else None

    def save(self, state: State, step: int) -> Path:
        """Write a step checkpoint, then delete the oldest beyond `keep`.

        Only checkpoints older than the one just written are deleted.

        Raises:
            CheckpointError: The disk refused; earlier checkpoints are as they were.
        """
        path = self.folder / f"step-{step:08d}.pt"
        _write(path, state)
        older = [other for other in self.steps() if _step_of(other) < step]
        for stale in older[: max(0, len(older) + 1 - self.keep)]:
            stale.unlink()
        return path

    def save_best(self, state: State) -> Path:
        """Write `best.pt`, in place of the one before.

        Raises:
            CheckpointError: The disk refused; the best one so far is as it was.
        """
        _write(self.best, state)
        return self.best

    def sweep(self) -> None:
        """Remove what a killed writer left. Only one writer may use the folder at a time."""
        for leftover in self.folder.glob("*.pt.*.tmp"):
            leftover.unlink()


def _step_of(path: Path) -> int:
    match = _STEP_NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _write(path: Path, state: State) -> None:
    try:
        with publish(path) as file:
            torch.save({"format": FORMAT, **state}, file)
    # torch.save reports a full disk as a RuntimeError of its zip writer.
    except (StorageError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error}); make room or choose another --train.runs"
        ) from error
