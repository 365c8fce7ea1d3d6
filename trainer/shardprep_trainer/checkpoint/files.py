"""Checkpoints on disk: written completely or not at all, read without running pickled code.

    RUN/checkpoints/step-00002000.pt   all that continuing takes: weights, optimiser, position, ...
    RUN/model/                         the model at the best validation accuracy, see `model_folder`

A final name appears only by rename, after the bytes are on the disk, so that a kill at any moment
leaves the previous checkpoint in place.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import pickle
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from shardprep import StorageError, machine_errors, publish, sniff
from shardprep_trainer.checkpoint.model_folder import (
    CARD,
    DESCRIPTION,
    RECIPE,
    WEIGHTS,
    parse_model,
    write_model,
)
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
        StorageError: The disk or the machine refused. This says nothing about the checkpoint.
    """
    try:
        # To open a pipe would wait for a writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path}: cannot be read (it is not a file)")
        data = _read(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{path}: there is no such checkpoint; `ls {path.parent}` shows those there are"
        ) from error
    _refuse_other(data, path)
    return parse_model(data, path) if path.suffix == ".safetensors" else _parse_step(data, path)


def _refuse_other(data: bytes, path: Path) -> None:
    """CheckpointError if a file is another kind of file, or stands for one not downloaded."""
    found = sniff(data[:4096])
    if found is None:
        return
    if found.kind in ("pointer", "page"):
        raise CheckpointError(f"{path}: {found.what}")
    if found.kind in ("json", "text", "npy", "audio", "tar", "packed", "other"):
        raise CheckpointError(
            f"{path}: {found.what}, and no checkpoint; name the folder of a run or of a model, or "
            "a checkpoint"
        )


def _parse_step(data: bytes, path: Path) -> Checkpoint:
    try:
        vet(io.BytesIO(data))
        entries = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        check_values(entries)
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


def _read(path: Path) -> bytes:
    """The bytes of a file; where the disk fails, it is read once more."""
    with machine_errors(path):
        try:
            return path.read_bytes()
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return path.read_bytes()


@dataclass(frozen=True)
class Newest:
    """The newest undamaged checkpoint of a run."""

    checkpoint: Checkpoint
    training: Training
    """What continuing takes, which a step checkpoint always has."""
    unusable: tuple[DamagedCheckpointError | StorageError, ...]
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
        self._unusable: set[Path] = set()

    @property
    def best(self) -> Path:
        """The model at the best validation accuracy, once there is one."""
        return self.model / WEIGHTS

    def steps(self) -> list[Path]:
        """The step checkpoints, oldest first.

        Raises:
            StorageError: The folder cannot be listed. There may be checkpoints in it.
        """
        found = [self.folder / name for name in _names(self.folder) if _STEP_NAME.fullmatch(name)]
        return sorted(found, key=_step_of)

    def latest(self) -> Path | None:
        """The newest step checkpoint, or None; raises as `steps`."""
        found = self.steps()
        return found[-1] if found else None

    def load_newest(self) -> Newest:
        """Read the newest step checkpoint; if it is damaged or its disk fails, the one before it.

        Raises:
            CheckpointError: There is none, all are damaged, or the newest undamaged one is not
                one to resume from.
            StorageError: The machine refused to read one, or the disk fails under all of them.
        """
        unusable: list[DamagedCheckpointError | StorageError] = []
        for file in reversed(self.steps()):
            try:
                checkpoint = load(file)
            except (DamagedCheckpointError, StorageError) as error:
                if isinstance(error, StorageError) and not _is_of_disk(error):
                    raise
                unusable.append(error)
                self._unusable.add(file)
            else:
                if checkpoint.training is None:
                    raise CheckpointError(
                        f"{file}: holds a model alone, and nothing to resume from; take it by "
                        "--train.start_from instead"
                    )
                self.newest = file
                return Newest(checkpoint, checkpoint.training, tuple(unusable))
        if not unusable:
            raise CheckpointError(
                f"{self.folder}: there is no checkpoint to resume from; start without --resume, "
                "or name the run with --name and --train.runs"
            )
        for refusal in unusable:
            if isinstance(refusal, StorageError):
                raise refusal
        raise CheckpointError(
            f"{self.folder}: all of the {len(unusable)} checkpoints are damaged; check the disk, "
            "then start another run with --name NAME, from the best model so far if that is "
            "undamaged: "
            f"--train.start_from {self.model} ({unusable[0]})"
        )

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write a step checkpoint, then delete the oldest beyond `keep`.

        Only checkpoints older than the one just written are deleted, and none that `load_newest`
        could not use.

        Raises:
            StorageError: The disk refused; earlier checkpoints are as they were.
        """
        step = checkpoint.step
        path = self.folder / f"step-{step:08d}.pt"
        with publish(path) as file:
            target = _Target(file)
            try:
                # It takes whatever has `write` and `flush`.
                torch.save({"format": FORMAT, **to_plain(checkpoint)}, target)  # type: ignore[arg-type]
            except RuntimeError as error:
                # PyTorch makes this of an error of the file.
                raise (target.error or error) from None
        self.newest = path
        self._unusable.discard(path)
        # One that cannot be deleted now, or not be listed, is tried again after the next save.
        with contextlib.suppress(OSError, StorageError):
            older = [p for p in self.steps() if _step_of(p) < step and p not in self._unusable]
            for stale in older[: max(0, len(older) + 1 - self.keep)]:
                stale.unlink()
        return path

    def save_best(self, checkpoint: Checkpoint) -> None:
        """Write the model folder, in place of the model before.

        Raises:
            StorageError: The disk refused; the best model so far is as it was.
        """
        write_model(self.model, checkpoint)

    def sweep(self) -> None:
        """Remove what a killed writer left. Only one writer may use the folder at a time."""
        # What cannot be removed does no harm, and is tried again at the next start.
        models = "|".join(re.escape(name) for name in (WEIGHTS, DESCRIPTION, CARD, RECIPE))
        ours = ((self.folder, r"step-\d+\.pt"), (self.model, models))
        for folder, written in ours:
            with contextlib.suppress(OSError, StorageError):
                for name in _names(folder):
                    if re.fullmatch(rf"(?:{written})\..*\.tmp", name):
                        (folder / name).unlink()


class _Target:
    """A file to write to that remembers why it could not be written.

    Attributes:
        error: The error, if there was one.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def _names(folder: Path) -> list[str]:
    """The names in a folder; none if there is no such folder."""
    try:
        with machine_errors(folder):
            return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _step_of(path: Path) -> int:
    match = _STEP_NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _is_of_disk(error: StorageError) -> bool:
    """Whether the disk fails where a file lies, for good: another file may lie elsewhere."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EIO
