"""Weights of another model, taken over for other speakers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from saved_models import make_checkpoint

from shardprep_trainer.checkpoint.weights import load_model, start_from
from shardprep_trainer.config.fields import Config, ModelConfig
from shardprep_trainer.errors import CheckpointError

WIDTH = 32
"""Of the embedding."""


def config(**model: Any) -> Config:
    sizes = {"dim": WIDTH, "layers": 1, "heads": 2, "ff_dim": 64, "kernel_size": 7, **model}
    return Config(model=ModelConfig(**sizes))


@pytest.mark.parametrize(
    ("classifier", "before", "after"),
    [
        ("cosine", 3, 5),
        ("linear", 3, 5),
        ("mlp", 3, 5),
        # As many speakers as the embedding is wide: the first layer of the head has as many rows.
        ("mlp", WIDTH, WIDTH),
    ],
)
def test_speakers_that_both_know_keep_their_scores(
    classifier: str, before: int, after: int
) -> None:
    of = config(classifier=classifier)
    known = tuple(f"id{number}" for number in range(before))
    wanted = ("new", *reversed(known))[:after]
    wanted += tuple(f"other{number}" for number in range(after - len(wanted)))
    old = make_checkpoint(of, 1, speakers=known)
    model = load_model(make_checkpoint(of, 2, speakers=wanted)).eval()
    mel, lengths = torch.randn(2, 50, 40), torch.tensor([50, 30])
    with torch.inference_mode():
        own_head = model.classifier(torch.eye(WIDTH))
        told = start_from(model, old, wanted)
        expected, found = load_model(old).eval()(mel, lengths), model(mel, lengths)
        head = model.classifier(torch.eye(WIDTH))
    assert told == tuple(name for name in wanted if name not in known)
    for column, name in enumerate(wanted):
        if name in known:
            torch.testing.assert_close(found[:, column], expected[:, known.index(name)])
        elif classifier != "mlp":
            assert torch.equal(head[:, column], own_head[:, column])


def test_another_model_is_refused_whatever_its_speakers() -> None:
    other = make_checkpoint(config(layers=2), 1, file=Path("old.safetensors"))
    model = load_model(make_checkpoint(config(), 2, speakers=("a", "b")))
    with pytest.raises(CheckpointError, match=r"old\.safetensors: the weights in it do not fit"):
        start_from(model, other, ("a", "b"))
