"""The moving average of weights against its recursion, written out number by number."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shardprep_trainer.learning.average import AveragedModel


def test_it_follows_the_weights_by_its_recursion_and_copies_running_statistics() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average = AveragedModel(model, decay=0.5)
    expected = [w.detach().clone() for w in model.parameters()]
    for step in range(6):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight))
        model(torch.randn(4, 3))
        average.update(step)
        keep = min(0.5, (1 + step) / (10 + step))
        expected = [
            keep * e + (1 - keep) * w.detach()
            for e, w in zip(expected, model.parameters(), strict=True)
        ]
        for found, value in zip(average.model.parameters(), expected, strict=True):
            torch.testing.assert_close(found, value)
        assert torch.equal(average.model[1].running_mean, model[1].running_mean)
    assert not torch.equal(average.model[0].weight, model[0].weight)


def test_it_is_a_copy_that_neither_trains_nor_drops() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)).train()
    average = AveragedModel(model, decay=0.9)
    assert not average.model.training
    assert model.training
    assert not any(weight.requires_grad for weight in average.model.parameters())
    assert average.model[0].weight.data_ptr() != model[0].weight.data_ptr()


@pytest.mark.parametrize("steps", [1, 50])
def test_weights_at_rest_are_their_own_average(steps: int) -> None:
    model = nn.Linear(4, 4)
    average = AveragedModel(model, decay=0.9)
    for step in range(steps):
        average.update(step)
    torch.testing.assert_close(average.model.weight, model.weight)
