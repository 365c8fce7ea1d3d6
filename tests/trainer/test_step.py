"""A training step: skipped without a trace where something is not finite, however it is decided."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.config import Config, OptimConfig
from trainer.engine import Trainer

ConfigFactory = Callable[..., Config]
Batch = dict[str, Tensor]


def fused(config: OptimConfig, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """The optimiser of a GPU, which a CPU can run as well."""
    return torch.optim.AdamW(
        model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
    )


@pytest.fixture(params=["branch", "device"])
def make_trainer(
    request: pytest.FixtureRequest, make_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Trainer]:
    """Trainers whose steps are skipped by a branch on the host, or on the device."""
    if request.param == "device":
        monkeypatch.setattr("trainer.engine.build_optimizer", fused)
    return lambda **changes: Trainer(make_config(**changes))


class Spoiled(nn.Module):
    """A criterion of which some calls, counted from 0, are spoiled."""

    def __init__(self, criterion: nn.Module, how: str, bad: set[int]) -> None:
        super().__init__()
        self.criterion, self.how, self.bad, self.calls = criterion, how, bad, 0

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        spoil = self.calls in self.bad
        self.calls += 1
        if spoil and self.how == "gradient":
            logits.register_hook(lambda gradient: gradient * math.inf)
        loss: Tensor = self.criterion(logits, labels)
        if spoil and self.how == "nan":
            return loss * math.nan
        # The gradient of an infinite loss is finite here.
        return loss + math.inf if spoil and self.how == "inf" else loss


def state(trainer: Trainer) -> dict[str, Tensor]:
    """All that a step may change: weights, running statistics, moments and their step counts."""
    moments = trainer.optimizer.state_dict()["state"]
    flat = {f"{i}.{key}": x for i, values in moments.items() for key, x in values.items()}
    return {key: x.clone() for key, x in {**trainer.bare.state_dict(), **flat}.items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def take(trainer: Trainer, steps: list[int], batches: list[list[Batch]]) -> None:
    for step in steps:
        trainer.train_step(iter(batches[step]), step)


def some_batches(trainer: Trainer, steps: int) -> list[list[Batch]]:
    source: Iterator[Any] = iter(trainer.loader)
    parts = trainer.config.train.accumulate
    return [
        [{key: x.clone() for key, x in next(source).items()} for _ in range(parts)]
        for _ in range(steps)
    ]


@pytest.mark.parametrize("how", ["nan", "inf", "gradient"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_skipped_step_is_as_if_it_had_never_been(
    make_trainer: Callable[..., Trainer], how: str, accumulate: int
) -> None:
    changes = {"train.accumulate": accumulate, "data.batch_size": 4 // accumulate}
    spoiled, plain = (make_trainer(name=name, **changes) for name in ("spoiled", "plain"))
    batches = some_batches(plain, 5)
    criterion = spoiled.train_step.criterion
    # The first step, before there are moments; then one amid others, its last micro-batch only.
    bad = {0, 3 * accumulate - 1}
    spoiled.train_step.criterion = Spoiled(criterion, how, bad)
    take(spoiled, [0, 1, 2, 3, 4], batches)
    take(plain, [1, 3, 4], batches)
    assert equal(state(spoiled), state(plain))
    assert spoiled.train_step.meter.sums[4:7].tolist() == [3, 2, 0]
    take(plain, [2], batches)
    assert not equal(state(spoiled), state(plain))


def test_features_that_are_not_finite_do_not_reach_the_running_statistics(
    make_trainer: Callable[..., Trainer],
) -> None:
    trainer = make_trainer()
    batches = some_batches(trainer, 2)
    take(trainer, [0], batches)
    before = state(trainer)
    batches[1][0]["mel"][1, 3] = math.nan
    take(trainer, [1], batches)
    assert any("running_var" in key for key in before)
    assert equal(state(trainer), before)
