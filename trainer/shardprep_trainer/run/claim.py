"""Keeps a run folder to one run: two of one name would overwrite each other's checkpoints.

    RUN/lock    held by process 0 from before it reads the checkpoints until the run has ended

The lock ends with its process. A second run is refused, with the name of the process. It waits for
a while, and says so, where that process is about to leave: it saves after a signal or at its end;
or it belongs to the same launch or job, whose launcher has started this one in its place.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from shardprep import HeldLock, LockHeldError, hold_lock
from shardprep_trainer.errors import ConfigError

PATIENCE = 120.0
"""Longest time to wait for a run that is about to leave [s]."""

_POLL_SECONDS = 0.2
_SILENCE_SECONDS = 2.0


class RunClaim:
    """The claim of one process on a run folder.

    Args:
        run: The run folder.
        main: Whether this is process 0; the others claim nothing.
    """

    def __init__(self, run: Path, *, main: bool) -> None:
        self._run = run
        self._main = main
        self._file = run / "lock"
        self._held: HeldLock | None = None
        self._stack = contextlib.ExitStack()
        self._jobs: tuple[str, ...] = ()

    def take(self, jobs: Sequence[str]) -> None:
        """Claim the folder; wait if the run that has it is about to leave.

        Args:
            jobs: What this run belongs to: its launchers, and the job of the scheduler.

        Raises:
            ConfigError: Another run has the folder.
            StorageError: The folder cannot be made or locked.
        """
        if not self._main:
            return
        self._jobs = tuple(jobs)
        began, told = time.monotonic(), False
        while self._held is None:
            try:
                self._held = self._stack.enter_context(hold_lock(self._file))
            except LockHeldError as error:
                # This process would wait for itself.
                leaves = not error.own and _leaves(error.note, jobs)
                if leaves and not told:
                    told = True
                    self._tell_wait(error)
                # Without a note, a run has just come, or is just gone.
                silence = PATIENCE if told else _SILENCE_SECONDS
                patience = PATIENCE if leaves else 0.0 if error.note else silence
                if time.monotonic() - began >= patience:
                    raise self._refusal(error) from None
                time.sleep(_POLL_SECONDS)
        self._say(leaves=False)

    def leave_soon(self) -> None:
        """Tell others that the run only saves, and then ends."""
        self._say(leaves=True)

    def release(self) -> None:
        """Give the folder up; it is removed if nothing was written there."""
        if self._held is None:
            return
        self._held = None
        with contextlib.suppress(OSError):
            self._file.unlink()
        self._stack.close()
        with contextlib.suppress(OSError):
            self._run.rmdir()

    def _say(self, *, leaves: bool) -> None:
        if self._held is not None:
            self._held.say(json.dumps({"jobs": self._jobs, "leaves": leaves}))

    def _refusal(self, error: LockHeldError) -> ConfigError:
        text = (
            f"name: the run folder {self._run} {error.what}; choose another --name, or wait for it"
        )
        if error.leftover is not None:
            text += f". If that process no longer runs, remove {error.leftover}"
        return ConfigError(text)

    def _tell_wait(self, error: LockHeldError) -> None:
        click.echo(
            f"note: the run folder {self._run} {error.what}, which is about to end; waiting up to "
            f"{PATIENCE:.0f} s for it",
            err=True,
        )


def jobs_of(environment: Mapping[str, str]) -> list[str]:
    """The jobs that this process belongs to, as SLURM and the user of torchrun number them.

    A job that is queued again keeps its number, and the process that it had before may still save.
    A machine of a torchrun that is gone may hold the lock until the file server notices.
    """
    slurm, cluster = environment.get("SLURM_JOB_ID"), environment.get("SLURM_CLUSTER_NAME", "")
    elastic = environment.get("TORCHELASTIC_RUN_ID", "none")
    return [
        *([f"slurm {cluster} {slurm}"] if slurm else []),
        *([f"torchrun {elastic}"] if elastic != "none" else []),
    ]


def _leaves(note: str, jobs: Sequence[str]) -> bool:
    """Whether the run that left this note is about to end, or belongs to one of these jobs."""
    try:
        found = json.loads(note)
        return bool(found["leaves"]) or not set(jobs).isdisjoint(found["jobs"])
    except (ValueError, KeyError, TypeError):
        return False
