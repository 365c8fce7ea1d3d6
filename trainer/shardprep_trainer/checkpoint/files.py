"""Checkpoints on disk: written whole or not at all, read without running pickled code.

    RUN/checkpoints/step-00002000.pt   all that continuing takes: weights, optimiser, position, ...
    RUN/checkpoints/best.pt            a copy of the weights at the best validation accuracy

A final name appears only by rename, after the bytes are on the disk, so that a kill at any moment
leaves the previous checkpoint in place.
"""

from __future__ import annotations

import contextlib
import errno
import pickle
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shardprep import StorageError, publish
from shardprep_trainer.checkpoint.vetting import check_values, vet
from shardprep_trainer.errors import CheckpointError, DamagedCheckpointError, is_out_of_memory

State = dict[str, Any]

FORMAT = 1
_STEP_NAME = re.compile(r"step-(\d{8,})\.pt")


def load(path: Path, needs: Iterable[str] = ()) -> State:
    """Read a checkpoint onto the CPU, whoever it is from.

    No code in it is run, and the memory taken is in proportion to its size.

    Args:
        path: The file.
        needs: Entries that it must have.

    Raises:
        DamagedCheckpointError: The file is torn, or a byte of it has changed.
        CheckpointError: It is missing, of another format version, lacks an entry, or holds
            what a checkpoint never does.
    """
    try:
        state = _read(path)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: there is no such checkpoint; `ls {path.parent}` shows those there are"
        ) from error
    except OSError as error:
        kind = DamagedCheckpointError if error.errno == errno.EIO else CheckpointError
        raise kind(f"{path}: cannot be read ({error.strerror or error})") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, for it holds what no checkpoint of trainer does ({_brief(error)}); "
            "take one that trainer wrote"
        ) from error
    # A damaged file can raise nearly anything.
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise DamagedCheckpointError(
            f"{path}: not a whole checkpoint ({_brief(error)}); --resume goes on from the one "
            "before it, and --checkpoint FILE takes another"
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


def _read(path: Path) -> State:
    # To open a pipe would wait for a writer; a folder is refused by name.
    if stat.S_IFMT(path.stat().st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
        raise OSError("neither a file nor a folder")
    with path.open("rb") as file:
        vet(file)
        state: State = torch.load(file, map_location="cpu", weights_only=True)
    check_values(state)
    return state


@dataclass(frozen=True)
class Newest:
    """The newest checkpoint of a run that is whole."""

    file: Path
    state: State
    damaged: tuple[DamagedCheckpointError, ...]
    """Of newer ones, what is the matter with each; the newest first."""


class CheckpointFolder:
    """The `checkpoints/` folder of a run.

    Args:
        run: The run folder.
        keep: Step checkpoints kept, newest first, at least 1.

    Attributes:
        newest: The step checkpoint that was read or written last, if any.
    """

    def __init__(self, run: Path, keep: int = 1) -> None:
        assert keep >= 1
        self.folder = run / "checkpoints"
        self.keep = keep
        self.newest: Path | None = None
        self._damaged: set[Path] = set()

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

    def load_newest(self, needs: Iterable[str] = ()) -> Newest:
        """Read the newest step checkpoint, or if that is damaged, the one before it.

        Args:
            needs: Entries that it must have.

        Raises:
            CheckpointError: There is none, all are damaged, or the newest whole one cannot serve.
        """
        damaged: list[DamagedCheckpointError] = []
        for file in reversed(self.steps()):
            try:
                state = load(file, needs)
            except DamagedCheckpointError as error:
                damaged.append(error)
                self._damaged.add(file)
            else:
                self.newest = file
                return Newest(file, state, tuple(damaged))
        if not damaged:
            raise CheckpointError(
                f"{self.folder}: there is no checkpoint to resume from; start without --resume, "
                "or name the run with --name and --train.runs"
            )
        raise CheckpointError(
            f"{self.folder}: none of the {len(damaged)} checkpoints is whole; check the disk, then "
            "start another run with --name NAME, from the best weights so far if those are whole: "
            f"--train.start_from {self.best} ({damaged[0]})"
        )

    def save(self, state: State, step: int) -> Path:
        """Write a step checkpoint, then delete the oldest beyond `keep`.

        Only checkpoints older than the one just written are deleted, and none that `load_newest`
        has found to be damaged.

        Raises:
            CheckpointError: The disk refused; earlier checkpoints are as they were.
        """
        path = self.folder / f"step-{step:08d}.pt"
        _write(path, state)
        self.newest = path
        self._damaged.discard(path)
        # One that is known to be damaged does not count.
        older = [p for p in self.steps() if _step_of(p) < step and p not in self._damaged]
        for stale in older[: max(0, len(older) + 1 - self.keep)]:
            # One that cannot be deleted now is tried again after the next save.
            with contextlib.suppress(OSError):
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


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


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
