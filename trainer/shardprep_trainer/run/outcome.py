"""How a run ended, and the command that continues it."""

from __future__ import annotations

import os
import shlex
import signal
from dataclasses import dataclass

from shardprep_trainer.config.encoders import is_foreign
from shardprep_trainer.config.fields import Config
from shardprep_trainer.processes.launch import launch_command, training_program


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    step: int
    """Steps done in all."""
    finished: bool
    """Whether these are all the steps of the run."""
    signal: int
    """Number of the signal that ended the run early, or 0."""
    best_accuracy: float | None
    """Validation accuracy of the best model so far, None where there is none."""
    best_step: int | None
    """Step of the best model, None without validation."""
    best_eer: float | None = None
    """Its equal error rate, where that chose it."""


def summary(
    config: Config, outcome: Outcome, *, processes: int, device: str, precision: str, test: bool
) -> str:
    """What the run has done, and the command that continues it.

    Args:
        config: Of the run.
        outcome: Its end.
        processes: Number of its processes.
        device: Type of their devices, e.g. "cpu".
        precision: Their mixed precision: no, fp16 or bf16.
        test: Whether the shards have a split test.
    """
    lines = []
    if outcome.best_eer is not None:
        lines.append(
            f"best equal error rate of new speakers {100 * outcome.best_eer:.2f} % at step "
            f"{outcome.best_step:,}"
        )
    elif outcome.best_accuracy is not None:
        lines.append(
            f"best validation accuracy {outcome.best_accuracy:.4f} at step {outcome.best_step:,}"
        )
    if outcome.finished:
        lines.insert(0, f"finished all {outcome.step:,} steps; the run is in {config.run}")
        # Without a split test, there is nothing to predict.
        command = ["shardprep", "predict" if test else "score", str(config.run)]
        for place in config.data.places:
            command += ["--shards", place]
        command += ["--out", "submission.csv"] if test else []
        if outcome.best_step is None:
            command += ["--checkpoint", "last"]
        if is_foreign(config.model.encoder):
            command += ["--encoder", config.model.encoder]
        lines.append(f"next: {shlex.join(command)}")
        return "\n".join(lines)
    why = signal.Signals(outcome.signal).name if outcome.signal else "--train.stop_step"
    of = f"{outcome.step:,} of {config.train.total_steps:,}"
    lines.insert(0, f"stopped by {why}: saved step {of} in {config.run / 'checkpoints'}")
    saved = f"--config {shlex.quote(str(config.run / 'config.yaml'))} --resume"
    if is_foreign(config.model.encoder):
        saved += f" --model.encoder {config.model.encoder}"
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:
        lines.append(
            "continue with: the same launch on every machine, with these options after "
            f"{training_program()}: {saved}"
        )
        return "\n".join(lines)
    launch = launch_command(processes=processes, device=device, precision=precision)
    lines.append(f"continue with: {launch} {saved}")
    return "\n".join(lines)
