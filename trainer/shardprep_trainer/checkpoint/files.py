"""Checkpoints on disk: written completely or not at all, read without running pickled code.

    RUN/checkpoints/step-00002000.pt   all that continuing takes: weights, optimiser, position, ...
    RUN/model/                         the model at the best validation accuracy, see `model_folder`

A final name appears only by rename, after the bytes are on the disk, so that a kill at any moment
leaves the previous checkpoint in place.
"""

from __future__ import annotations

import contextlib
import errno
import pickle
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from shardprep import StorageError, publish
from shardprep_trainer.checkpoint.model_folder import WEIGHTS, read_model, write_model
from shardprep_trainer.checkpoint.state import (
    FORMAT,
    Checkpoint,
    Training,
    brief,
    check_format,
    parse,
    to_plain,
)
from shardprep_trainer.checkpoint.vetting import check_values, vet
from shardprep_trainer.errors import CheckpointError, DamagedCheckpointError, is_out_of_memory

_STEP_NAME = re.compile(r"step-(\d{8,})\.pt")


def load(path: Path) -> Checkpoint:
    """Read a checkpoint or a model, which may come from a stranger, onto the CPU.

    No code in it is run, and the memory taken is in proportion to its size.

    Args:
        path: The file, `model.safetensors` or `step-N.pt`.

    Raises:
        DamagedCheckpointError: The file is torn, or a byte of it has changed.
        CheckpointError: It is missing, of another format version, lacks an entry, or holds
            what a checkpoint never does.
    """
    try:
        # To open a pipe would wait for a writer; a folder is refused by name.
        if stat.S_IFMT(path.stat().st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
            raise OSError("neither a file nor a folder")
        return read_model(path) if path.suffix == ".safetensors" else _read_step(path)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: there is no such checkpoint; `ls {path.parent}` shows those there are"
        ) from error
    except OSError as error:
        kind = DamagedCheckpointError if error.errno == errno.EIO else CheckpointError
        raise kind(f"{path}: cannot be read ({error.strerror or error})") from error


def _read_step(path: Path) -> Checkpoint:
    try:
        with path.open("rb") as file:
            vet(file)
            entries = torch.load(file, map_location="cpu", weights_only=True)
        check_values(entries)
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, for it holds what no checkpoint does ({brief(error)}); take a "
            "checkpoint that the trainer wrote"
        ) from error
    # A damaged file can raise nearly anything.
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise DamagedCheckpointError(
            f"{path}: damaged ({brief(error)}); --resume continues from the checkpoint before it, "
            "and --checkpoint FILE takes another"
        ) from error
    check_format(entries, path)
    return parse(entries, path)


@dataclass(frozen=True)
class Newest:
    """The newest undamaged checkpoint of a run."""

    checkpoint: Checkpoint
    training: Training
    """What continuing takes, which a step checkpoint always has."""
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
        self.model = run / "model"
        self.keep = keep
        self.newest: Path | None = None
        self._damaged: set[Path] = set()

    @property
    def best(self) -> Path:
        """The model at the best validation accuracy, once there is one."""
        return self.model / WEIGHTS

    def steps(self) -> list[Path]:
        """The step checkpoints, oldest first."""
        found = [path for path in self.folder.glob("step-*.pt") if _STEP_NAME.fullmatch(path.name)]
        return sorted(found, key=_step_of)

    def latest(self) -> Path | None:
        """The newest step checkpoint, or None."""
        found = self.steps()
        return found[-1] if found else None

    def load_newest(self) -> Newest:
        """Read the newest step checkpoint, or if that is damaged, the one before it.

        Raises:
            CheckpointError: There is none, all are damaged, or the newest undamaged one is not
                one to resume from.
        """
        damaged: list[DamagedCheckpointError] = []
        for file in reversed(self.steps()):
            try:
                checkpoint = load(file)
            except DamagedCheckpointError as error:
                damaged.append(error)
                self._damaged.add(file)
            else:
                if checkpoint.training is None:
                    raise CheckpointError(
                        f"{file}: holds a model alone, and nothing to resume from; take it by "
                        "--train.start_from instead"
                    )
                self.newest = file
                return Newest(checkpoint, checkpoint.training, tuple(damaged))
        if not damaged:
            raise CheckpointError(
                f"{self.folder}: there is no checkpoint to resume from; start without --resume, "
                "or name the run with --name and --train.runs"
            )
        raise CheckpointError(
            f"{self.folder}: all of the {len(damaged)} checkpoints are damaged; check the disk, "
            "then start another run with --name NAME, from the best model so far if that is "
            "undamaged: "
            f"--train.start_from {self.model} ({damaged[0]})"
        )

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write a step checkpoint, then delete the oldest beyond `keep`.

        Only checkpoints older than the one just written are deleted, and none that `load_newest`
        has found to be damaged.

        Raises:
            CheckpointError: The disk refused; earlier checkpoints are as they were.
        """
        step = checkpoint.step
        path = self.folder / f"step-{step:08d}.pt"
        with _refused(path), publish(path) as file:
            torch.save({"format": FORMAT, **to_plain(checkpoint)}, file)
        self.newest = path
        self._damaged.discard(path)
        # One that is known to be damaged does not count.
        older = [p for p in self.steps() if _step_of(p) < step and p not in self._damaged]
        for stale in older[: max(0, len(older) + 1 - self.keep)]:
            # One that cannot be deleted now is tried again after the next save.
            with contextlib.suppress(OSError):
                stale.unlink()
        return path

    def save_best(self, checkpoint: Checkpoint) -> None:
        """Write the model folder, in place of the model before.

        Raises:
            CheckpointError: The disk refused; the best model so far is as it was.
        """
        with _refused(self.best):
            write_model(self.model, checkpoint)

    def sweep(self) -> None:
        """Remove what a killed writer left. Only one writer may use the folder at a time."""
        for leftover in (*self.folder.glob("*.pt.*.tmp"), *self.model.glob("*.tmp")):
            leftover.unlink()


def _step_of(path: Path) -> int:
    match = _STEP_NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


@contextlib.contextmanager
def _refused(path: Path) -> Iterator[None]:
    """Turn the refusal of a disk into a CheckpointError."""
    try:
        yield
    # torch.save reports a full disk as a RuntimeError of its zip writer.
    except (StorageError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error}); make room or choose another --train.runs"
        ) from error
