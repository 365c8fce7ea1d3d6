"""Entry of `accelerate launch trainer/train.py`: parse, build, fit, close."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shardprep import ShardprepError
from trainer.config import Config
from trainer.errors import TrainerError
from trainer.launch import parent_command, processes_to_start, start_processes
from trainer.options import parse_args

if TYPE_CHECKING:
    from trainer.engine import Outcome

_MAIN_PROCESS_FIRST_SECONDS = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit code: 0 done, 1 failed, 2 usage or configuration, 130 after Ctrl-C, 143 after
        SIGTERM, and the codes of `shardprep` for shards that cannot be read.
    """
    try:
        asked = parse_args(sys.argv[1:] if argv is None else argv)
        if asked.print_config:
            if _rank() == 0:
                sys.stdout.write(asked.config.to_yaml())
            return 0
        number = processes_to_start(dict(os.environ), parent_command())
        if number > 1:
            return start_processes(number)
        return _train(asked.config, resume=asked.resume)
    except (TrainerError, ShardprepError) as error:
        _report(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        _report("interrupted; nothing was saved since the last checkpoint")
        return 128 + signal.SIGINT


def _train(config: Config, *, resume: bool) -> int:
    # The engine brings PyTorch and the model, which --help and a wrong option need not wait for.
    from trainer.engine import Trainer

    trainer = Trainer(config, resume=resume)
    try:
        outcome = trainer.fit()
        if _rank() == 0:
            print(_summary(config, outcome), file=sys.stderr, flush=True)
        # A launcher ends all processes as soon as one has left with a code other than 0.
        trainer.accelerator.wait_for_everyone()
    finally:
        trainer.close()
    return 128 + outcome.signal if outcome.signal else 0


def _summary(config: Config, outcome: Outcome) -> str:
    """What was done, and the command that goes on from here."""
    lines = []
    if outcome.best_accuracy is not None:
        lines.append(
            f"best validation accuracy {outcome.best_accuracy:.4f} at step {outcome.best_step:,}"
        )
    if outcome.finished:
        lines.insert(0, f"finished all {outcome.step:,} steps; the run is in {config.run}")
        shards = shlex.quote(config.data.shards)
        lines.append(
            f"next: python -m trainer.predict {shlex.quote(str(config.run))} "
            f"--shards {shards} --out submission.csv"
        )
        return "\n".join(lines)
    why = signal.Signals(outcome.signal).name if outcome.signal else "--train.stop_step"
    of = f"{outcome.step:,} of {config.train.total_steps:,}"
    lines.insert(0, f"stopped by {why}: saved step {of} in {config.run / 'checkpoints'}")
    lines.append(
        f"continue with: accelerate launch trainer/train.py "
        f"--config {shlex.quote(str(config.run / 'config.yaml'))} --resume"
    )
    return "\n".join(lines)


def _report(message: str) -> None:
    """Print an error once, though every process of a launch meets it.

    The launcher ends the other processes as soon as one has failed, so these leave the first
    word to the main process, and speak only where it had nothing to say.
    """
    if _rank() != 0:
        time.sleep(_MAIN_PROCESS_FIRST_SECONDS)
    print(message, file=sys.stderr, flush=True)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


if __name__ == "__main__":
    sys.exit(main())
