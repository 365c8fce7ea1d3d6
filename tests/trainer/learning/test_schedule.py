"""The schedule and the seeds: functions of the step alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from shardprep_trainer.learning.schedule import learning_rate, margin, step_seed


@pytest.mark.parametrize(("warmup", "total"), [(5, 20), (1, 4), (19, 20)])
def test_learning_rate_is_what_pytorch_schedulers_give(warmup: int, total: int) -> None:
    peak = 3e-3
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    # Reaches the peak at step warmup - 1; the cosine then starts from the peak at step warmup.
    rise = LinearLR(optimizer, 1 / warmup, 1.0, max(1, warmup - 1))
    fall = CosineAnnealingLR(optimizer, total - warmup)
    schedule = SequentialLR(optimizer, [rise, fall], milestones=[warmup])
    for step in range(total):
        found = learning_rate(step, peak=peak, warmup_steps=warmup, total_steps=total)
        assert found == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), step
        optimizer.step()
        schedule.step()


def test_learning_rate_begins_small_peaks_once_and_ends_near_zero() -> None:
    rates = [learning_rate(s, peak=1.0, warmup_steps=10, total_steps=100) for s in range(100)]
    assert rates[0] == 0.1
    assert rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert 0 < rates[99] < 1e-3
    assert learning_rate(0, peak=1.0, warmup_steps=0, total_steps=10) == 1.0


def test_seeds_are_repeatable_and_differ_in_every_argument() -> None:
    places = list(itertools.product(range(5), range(40), range(8)))
    seeds = {step_seed(*place) for place in places}
    assert len(seeds) == len(places)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert step_seed(1, 2, 3) == step_seed(1, 2, 3)


def test_a_margin_grows_in_a_straight_line_and_stays() -> None:
    margins = [margin(step, final=0.2, growth_steps=4) for step in range(7)]
    assert margins == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2, 0.2, 0.2])
    assert margin(0, final=0.2, growth_steps=0) == 0.2
