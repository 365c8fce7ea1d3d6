"""What a run reports: metrics.jsonl, the trackers, and progress on stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from accelerate import Accelerator
from tqdm import tqdm

from shardprep import machine_errors, publish

Record = dict[str, Any]

_TRACKERS, _NO_MORE = "the files of train.trackers", "no more is written there"


class MetricsLog:
    """`metrics.jsonl`: one JSON object for each event, such as a validation, with its `step`.

    Args:
        path: The file; the first record creates it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting = b""

    def append(self, record: Record) -> None:
        """Add a record as one line, after the records that could not be written before.

        Raises:
            OSError: The file is unchanged; the record is written with the next one.
        """
        self._waiting += json.dumps(record).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Write the records that could not be written before; raises as `append`."""
        if self._waiting:
            self.write(self._waiting)
        self._waiting = b""

    def write(self, data: bytes) -> None:
        """Add all of the bytes, or none.

        Raises:
            OSError: The file is unchanged.
        """
        with self.path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                # A disk that is almost full takes a part, and refuses the rest.
                while data:
                    data = data[file.write(data) :]
            except OSError:
                file.truncate(end)
                raise

    def truncate(self, step: int) -> None:
        """Drop the records after `step`, and lines that are no records, as a kill may leave.

        A resumed run writes these records again, so that the file is that of an uninterrupted run.

        Raises:
            StorageError: The disk or the machine refused; the file is unchanged.
        """
        try:
            with machine_errors(self.path):
                lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return
        kept = []
        for line in lines:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            number = record.get("step") if isinstance(record, dict) else None
            if isinstance(number, int) and number <= step:
                kept.append(line + b"\n")
        with publish(self.path) as file:
            file.write(b"".join(kept))


def _on_terminal() -> bool:
    """Whether stderr can show a bar; some terminals of CI systems have no width and cannot."""
    try:
        if sys.stderr is None:
            return False
        return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except OSError:
        return False


class Progress:
    """Progress on stderr: a bar on a terminal, else a line for each log step.

    Args:
        total: Steps of the run.
        step: Steps done before.
        enabled: False prints nothing, for all ranks but the main one.
    """

    def __init__(self, total: int, step: int, *, enabled: bool) -> None:
        self.total = total
        self.enabled = enabled
        self._begun = (time.monotonic(), step)
        self._bar: tqdm[Any] = tqdm(
            total=total,
            initial=step,
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
            disable=not (enabled and _on_terminal()),
        )

    def advance(self) -> None:
        """Count one step."""
        self._bar.update()

    def show(self, record: Record) -> None:
        """Show a training record."""
        text = (
            f"loss {record['loss']:.4f}, accuracy {record['accuracy']:.3f}, "
            f"lr {record['lr']:.2e}, {record['samples_per_second']:,.0f} samples/s, "
            f"waiting {record['waiting']:.0%}"
        )
        if record["network"]:
            text += f", of that network {record['network']:.0%}"
        if not self._bar.disable:
            self._bar.set_postfix_str(text)
        else:
            self.say(f"step {record['step']:,}/{self.total:,}: {text}{self._left(record['step'])}")

    def _left(self, step: int) -> str:
        """The time until the last step, as fast as the steps so far, validations included."""
        begun, first = self._begun
        if not first < step < self.total:
            return ""
        seconds = (time.monotonic() - begun) / (step - first) * (self.total - step)
        return f", {tqdm.format_interval(seconds)} left"

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        # A run does not end because nobody reads its progress any longer.
        with contextlib.suppress(OSError):
            if self._bar.disable and self.enabled:
                click.echo(text, err=True)
            elif self.enabled:
                self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


class Journal:
    """All reports of a run, written by the main process; the other processes write nothing.

    Args:
        accelerator: Of the run; has the trackers.
        run: The run folder; the trackers show its name.
        step: Steps done before; records of later steps are dropped.
        total: Steps of the run.
    """

    def __init__(self, accelerator: Accelerator, run: Path, *, step: int, total: int) -> None:
        self._accelerator = accelerator
        self._main = bool(accelerator.is_main_process)
        self._log = MetricsLog(run / "metrics.jsonl")
        self._refused: set[str] = set()
        if self._main:
            self._log.truncate(step)
        self.progress = Progress(total, step, enabled=self._main)
        purge = {"tensorboard": {"purge_step": step + 1}}
        self._hook, threading.excepthook = threading.excepthook, self._thread_failed
        self._older = set(threading.enumerate())
        with self._tolerating(_TRACKERS, _NO_MORE):
            accelerator.init_trackers(run.name, init_kwargs=purge)
        if self._refused:
            # One may be there by half.
            accelerator.trackers = []

    def record(self, record: Record) -> None:
        """Write an event, a dict with `event` and `step`, to metrics.jsonl and the trackers."""
        self._append(record)
        values = {
            f"{record['event']}/{key}": value
            for key, value in record.items()
            if key not in ("event", "step")
        }
        # A tracker that failed once may hang the next time.
        if _TRACKERS not in self._refused:
            with self._tolerating(_TRACKERS, _NO_MORE):
                self._accelerator.log(values, step=record["step"])

    def warn(self, step: int, text: str) -> None:
        """Warn of a failure, on stderr and in metrics.jsonl."""
        self.progress.say(f"WARNING: {text}")
        self._append({"event": "warning", "step": step, "text": text})

    def close(self) -> None:
        """Leave the bar as it is, write what could not be written, and finish the trackers."""
        self.progress.close()
        with self._tolerating("the end of metrics.jsonl", "its last lines are missing"):
            self._log.flush()
        for tracker in self._accelerator.trackers:
            with self._tolerating(_TRACKERS, "the end of the curves may be missing"):
                tracker.finish()
        self._accelerator.trackers = []
        threading.excepthook = self._hook

    def _thread_failed(self, failed: threading.ExceptHookArgs) -> None:
        """Show no traceback of a tracker's thread: the tracker's next call raises the error."""
        if failed.thread in self._older or not isinstance(failed.exc_value, OSError):
            self._hook(failed)

    def _append(self, record: Record) -> None:
        if self._main:
            with self._tolerating("metrics.jsonl", "what is missing is written with the next line"):
                self._log.append(record)

    @contextlib.contextmanager
    def _tolerating(self, what: str, outcome: str) -> Iterator[None]:
        """Continue if a report cannot be written; say so once."""
        try:
            yield
        except OSError as error:
            if what not in self._refused:
                reason = error.strerror or str(error)
                self.progress.say(f"WARNING: {what} cannot be written ({reason}); {outcome}")
            self._refused.add(what)
