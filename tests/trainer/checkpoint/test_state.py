"""Checkpoints: complete, of the model itself, and refused by name where they do not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_models import BEST, make_checkpoint

from shardprep_trainer.checkpoint.files import load
from shardprep_trainer.checkpoint.state import parse, to_plain
from shardprep_trainer.checkpoint.weights import load_model, load_weights
from shardprep_trainer.config.fields import Config
from shardprep_trainer.errors import CheckpointError
from shardprep_trainer.learning.compilation import Compilation
from shardprep_trainer.model.build import build_model
from shardprep_trainer.run.start import prepare
from shardprep_trainer.run.trainer import Trainer

ConfigFactory = Callable[..., Config]


@pytest.fixture
def eager_compilation(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As `accelerate launch --dynamo_backend eager`."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    yield
    torch._dynamo.reset()


def train(config: Config, *, resume: bool = False) -> Trainer:
    trainer = Trainer(prepare(config, resume=resume))
    try:
        trainer.fit()
    finally:
        trainer.close()
    return trainer


@pytest.mark.slow
def test_a_compiled_model_is_saved_validated_and_resumed_as_the_model_itself(
    make_config: ConfigFactory, eager_compilation: None
) -> None:
    steps = {"train.total_steps": 3, "train.valid_steps": 2, "train.log_steps": 1}
    config = make_config(**steps, **{"train.stop_step": 2})
    trainer = train(config)
    assert trainer.train_step.compilation == Compilation("default", "eager")
    folder = config.run / "checkpoints"
    plain = build_model(config.model, 40, 3)
    for path in (config.run / BEST, folder / "step-00000002.pt"):
        assert sorted(load(path).weights) == sorted(plain.state_dict())
    assert train(make_config(**steps), resume=True).step == 3


def test_weights_of_another_model_are_refused_by_file(make_config: ConfigFactory) -> None:
    config, file = make_config(), Path("some/step-00000009.pt")
    model = build_model(config.model, 40, 3)
    weights = model.state_dict()
    name = next(iter(weights))
    wrapped = {f"_orig_mod.{key}": value for key, value in weights.items()}
    wide = {**weights, name: torch.zeros(7, 7)}
    for bad in (wrapped, wide, {}):
        with pytest.raises(CheckpointError, match=r"^some/step-00000009\.pt: the weights in it"):
            load_weights(model, bad, file)
    load_weights(model, weights, file)


@pytest.mark.parametrize(
    "change",
    [
        {"config": 5},
        {"config": {}},
        {"encoder": "rnn"},
        {"heads": 0},
        {"depth": 1},
        {"speakers": 3},
        {"speakers": []},
        {"speakers": ["a", "a", "b"]},
        {"weights": [1]},
        {"weights": {"a": [1.0]}},
        {"n_mels": 0},
        {"step": True},
        {"best": None},
        {"training": {"optimizer": {}}},
    ],
)
def test_entries_that_describe_no_model_are_refused_by_file(
    make_config: ConfigFactory, change: dict[str, Any]
) -> None:
    file = Path("some/step-00000009.pt")
    checkpoint = make_checkpoint(make_config(), 9)
    entries = to_plain(checkpoint)
    found = load_model(parse(entries, file)).state_dict()
    assert all(torch.equal(found[key], value) for key, value in checkpoint.weights.items())
    if change.keys() <= entries.keys():
        entries.update(change)
    else:
        entries["config"]["model"].update(change)
    with pytest.raises(CheckpointError, match=r"^some/step-00000009\.pt: (the settings in|not as)"):
        parse(entries, file)


def test_a_checkpoint_of_another_model_is_refused_on_resume_by_file(
    make_config: ConfigFactory,
) -> None:
    config = make_config(**{"train.stop_step": 1})
    train(config)
    path = config.run / "checkpoints" / "step-00000001.pt"
    saved = torch.load(path, weights_only=True)
    training = {**saved["training"], "optimizer": {"state": {}, "param_groups": []}}
    for bad in ({"weights": {}}, {"training": training}):
        torch.save({**saved, **bad}, path)
        with pytest.raises(CheckpointError, match=r"step-00000001\.pt: the .* do not fit"):
            prepare(make_config(), resume=True)
