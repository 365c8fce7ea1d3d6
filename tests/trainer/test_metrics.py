"""Meters: sums that weigh every sample alike, over all ranks, and rates of training alone."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from trainer.metrics import Meter, Throughput, combine, peak_memory_mib

CPU = torch.device("cpu")


def filled(batches: list[tuple[float, int, int]], norms: list[float], bad: list[int]) -> Meter:
    meter = Meter(CPU)
    for loss, correct, samples in batches:
        meter.add_batch(torch.tensor(loss), torch.tensor(correct), samples)
    for step, norm in enumerate(norms, 1):
        meter.add_step(torch.tensor(norm), torch.tensor(step not in bad), step)
    return meter


def test_the_mean_is_over_samples_not_over_batches_or_ranks() -> None:
    first = filled([(1.0, 1, 1), (4.0, 0, 3)], [2.0, 4.0], [])
    second = filled([(2.0, 4, 4)], [2.0, 4.0], [])
    loss, correct, samples, norm, steps, bad = combine(torch.stack([first.sums, second.sums]))
    assert loss / samples == (1 * 1 + 4 * 3 + 2 * 4) / 8
    assert (correct, samples) == (5, 8)
    # The gradient is exchanged, so its norm is one number and not one a rank.
    assert norm / steps == 3.0
    assert bad == 0


def test_the_earliest_step_that_was_not_finite_on_any_rank_is_found() -> None:
    ranks = [filled([], [1.0] * 9, bad) for bad in ([], [7, 8], [5, 9])]
    assert combine(torch.stack([meter.sums for meter in ranks]))[5] == 5


def test_an_overflow_that_the_scaler_skips_does_not_spoil_the_mean() -> None:
    meter = filled([], [2.0, math.inf, 4.0], [])
    _, _, _, norm, steps, bad = combine(meter.sums.unsqueeze(0))
    assert (norm, steps, bad) == (6.0, 2.0, 0.0)


def test_reset_begins_anew() -> None:
    meter = filled([(1.0, 1, 1)], [1.0], [1])
    meter.reset()
    assert combine(meter.sums.unsqueeze(0)) == [0.0] * 6


def test_rates_count_samples_and_the_share_of_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def slow() -> Iterator[dict[str, Tensor]]:
        nonlocal now
        while True:
            now += 3.0
            yield {"label": torch.zeros(8)}

    throughput, batches = Throughput(), slow()
    for _ in range(2):
        throughput.fetch(batches)
        now += 1.0
    assert throughput.rates(world_size=2) == {"samples_per_second": 4.0, "waiting": 0.75}
    throughput.restart()
    now += 1.0
    assert throughput.rates(world_size=2) == {"samples_per_second": 0.0, "waiting": 0.0}


def test_peak_memory_is_in_mib() -> None:
    # An interpreter with PyTorch holds more than 50 MiB and less than 50 GiB.
    assert 50 < peak_memory_mib(CPU) < 50_000
