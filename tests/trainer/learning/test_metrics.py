"""Meters: sums that weigh every sample alike, over all ranks, and rates of training alone."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from shardprep_trainer.learning.metrics import (
    Meter,
    Sums,
    Throughput,
    batch_sums,
    combine,
    peak_memory_mib,
)

CPU = torch.device("cpu")


def filled(
    batches: list[tuple[float, int, int]], norms: list[float], max_skipped: int = 9
) -> Meter:
    meter = Meter(CPU, max_skipped)
    for loss, correct, samples in batches:
        meter.add_batch(batch_sums(torch.tensor(loss), torch.tensor(correct), samples))
    for step, norm in enumerate(norms, 1):
        meter.add_step(torch.tensor(norm), torch.tensor(float(step)))
    return meter


def test_the_mean_is_over_samples_not_over_batches_or_ranks() -> None:
    first = filled([(1.0, 1, 1), (4.0, 0, 3)], [2.0, math.nan, 4.0])
    second = filled([(2.0, 4, 4)], [2.0, math.nan, 4.0])
    sums = combine(torch.stack([first.sums, second.sums]))
    assert sums.loss / sums.samples == (1 * 1 + 4 * 3 + 2 * 4) / 8
    assert (sums.correct, sums.samples) == (5, 8)
    # The gradient is exchanged, so there is one norm and one decision, not one a rank.
    assert (sums.norm, sums.steps, sums.skipped, sums.diverged) == (6.0, 2.0, 1.0, 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_left_out_of_the_means(bad: float) -> None:
    meter = filled([(1.0, 1, 2), (bad, 3, 5), (3.0, 0, 2)], [2.0, bad, 4.0])
    assert combine(meter.sums.unsqueeze(0)) == Sums(8.0, 1.0, 4.0, 6.0, 2.0, 1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("steps", "max_skipped", "in_a_row", "diverged"),
    [
        ("..x.", 0, 0, 3),
        ("xx.xx", 2, 2, 0),
        ("xx.xxx", 2, 3, 6),
        ("xxxx.xxx.", 2, 0, 3),
        ("x.x.x.x.x", 1, 1, 0),
        ("", 0, 0, 0),
    ],
)
def test_only_steps_skipped_in_a_row_are_a_divergence(
    steps: str, max_skipped: int, in_a_row: int, diverged: int
) -> None:
    meter = filled([], [math.nan if step == "x" else 1.0 for step in steps], max_skipped)
    sums = combine(meter.sums.unsqueeze(0))
    assert (sums.in_a_row, sums.diverged) == (in_a_row, diverged)
    assert (sums.skipped, sums.steps) == (steps.count("x"), steps.count("."))


def test_reset_keeps_the_number_of_steps_in_a_row() -> None:
    meter = filled([(1.0, 1, 1)], [1.0, math.nan, math.nan])
    meter.reset()
    assert combine(meter.sums.unsqueeze(0)) == Sums(0, 0, 0, 0, 0, 0, in_a_row=2, diverged=0)


def test_restored_sums_continue_where_they_were_cut_off() -> None:
    norms = [1.0, math.nan, math.nan, math.nan, math.nan]
    whole = filled([(2.0, 1, 3)], norms, 3)
    part, rest = filled([(2.0, 1, 3)], norms[:3], 3), Meter(CPU, 3)
    rest.restore(combine(part.sums.unsqueeze(0)))
    for step in (4, 5):
        rest.add_step(torch.tensor(math.nan), step)
    assert torch.equal(rest.sums, whole.sums)
    assert combine(whole.sums.unsqueeze(0)).diverged == 5


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
    assert throughput.rates(world_size=2) == {
        "samples_per_second": 4.0,
        "waiting": 0.75,
        "network": 0.0,
    }
    throughput.restart()
    now += 1.0
    assert throughput.rates(world_size=2) == {
        "samples_per_second": 0.0,
        "waiting": 0.0,
        "network": 0.0,
    }


def test_peak_memory_is_in_mib() -> None:
    # An interpreter with PyTorch holds more than 50 MiB and less than 50 GiB.
    assert 50 < peak_memory_mib(CPU) < 50_000
