"""What continuing a run takes: gathered for a checkpoint, and put back from a checkpoint."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor

from shardprep import SegmentLoader
from shardprep_trainer.checkpoint.state import Training, unfit


def gather_training(
    accelerator: Accelerator,
    optimizer: AcceleratedOptimizer,
    loader: SegmentLoader,
    *,
    global_batch: int,
    launchers: list[str],
    meter: list[float],
    raw: dict[str, Tensor] | None,
) -> Training:
    """Gather what continuing takes; see `Training` for the last four."""
    scaler = accelerator.scaler
    return Training(
        optimizer=optimizer.state_dict(),
        scaler=None if scaler is None else scaler.state_dict(),
        loader=loader.state_dict(),
        precision=str(accelerator.mixed_precision),
        processes=accelerator.num_processes,
        global_batch=global_batch,
        launchers=launchers,
        meter=meter,
        raw=raw,
    )


def restore_training(
    accelerator: Accelerator,
    optimizer: AcceleratedOptimizer,
    loader: SegmentLoader,
    saved: Training,
    file: Path,
) -> None:
    """Put optimiser, scaler and data position back; `file` is named in errors.

    Raises:
        CheckpointError: The optimiser's state is not that of such a model.
        ShardprepError: The position belongs to other data.
    """
    try:
        optimizer.load_state_dict(saved.optimizer)
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        raise unfit(file, "optimiser's moments", error) from error
    # A run that changes to or from fp16 begins with a fresh scaler, or needs none.
    if accelerator.scaler is not None and saved.scaler is not None:
        accelerator.scaler.load_state_dict(saved.scaler)
    loader.load_state_dict(saved.loader)
