"""Test of the method on the CPU at hand: rates from one recipe predict the steps of others.

One core computes, and its time is that of this process alone, so that other programs on the machine
hardly matter. Each recipe's step is timed as a whole; operation by operation only that of the
recipe that gives the rates.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import torch

from scripts.bench_train.predict.fuse import kernels_of
from scripts.bench_train.predict.rates import measured_rates
from scripts.bench_train.predict.steps import FEW, Step
from shardprep_trainer.model import cpu_kernels

CALIBRATED_ON = "boss"
OTHERS = ("simple", "medium", "strong", "mfa")


def check(batch: int, rounds: int, precision: str = "no") -> dict[str, Any]:
    """Predict the steps of the other recipes, and measure them; the shortest time counts.

    Args:
        batch: Segments of a step.
        rounds: How often each step is timed.
        precision: "no" or "bf16".
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # As the trainer does.
    cpu_kernels.keep_memory()
    try:
        step = Step(CALIBRATED_ON, batch, precision)
        traces = [
            step.trace(like_gpu=False, clock=time.process_time).operations for _ in range(rounds)
        ]
        rates = measured_rates(min(traces, key=lambda all_: sum(one.seconds for one in all_)))
        rows = [_compare(name, batch, rounds, precision, rates) for name in OTHERS]
    finally:
        torch.set_num_threads(threads)
    return {
        "calibrated_on": CALIBRATED_ON,
        "batch": batch,
        "precision": precision,
        "rounds": rounds,
        "rates": asdict(rates),
        "recipes": rows,
    }


def _compare(name: str, batch: int, rounds: int, precision: str, rates: Any) -> dict[str, Any]:
    small, large = (Step(name, few, precision).trace(like_gpu=False) for few in FEW)
    kernels = kernels_of(small, large, FEW, fused=False)
    predicted = batch / sum(rates.seconds(one, batch) for one in kernels)
    step = Step(name, batch, precision)
    measured = batch / min(step.seconds(time.process_time) for _ in range(rounds))
    return {
        "name": name,
        "kernels": len(kernels),
        "predicted_segments_per_s": predicted,
        "measured_segments_per_s": measured,
        "ratio": predicted / measured,
    }
