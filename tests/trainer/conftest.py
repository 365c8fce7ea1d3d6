"""Fixtures of the trainer's tests: small shards, small runs, one CPU process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

import shardprep
from shardprep_trainer.checkpoint.files import CheckpointFolder
from shardprep_trainer.config.command_line import RECIPES, parse_args
from shardprep_trainer.config.fields import Config

# For the modules beside the tests.
sys.path.insert(0, str(Path(__file__).parent))

from saved_models import make_checkpoint  # noqa: E402

ConfigFactory = Callable[..., Config]


@pytest.fixture(autouse=True)
def one_cpu_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Results do not depend on the machine, nor a test on the Accelerator of the one before."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    # For programs that a test starts, and for this one: two threads a process only get in the way.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def shards(make_dataset: Callable[..., Path], tmp_path: Path) -> Path:
    """Shards of 3 speakers: 24 utterances to train on, 6 to validate, 5 to test, all unequal."""
    source = make_dataset(speakers=3, utterances=10, test_utterances=5)
    options = shardprep.BuildOptions(val_fraction=0.2, workers=1)
    shardprep.build_shards(source, tmp_path / "shards", options)
    return tmp_path / "shards"


@pytest.fixture
def make_config(shards: Path, tmp_path: Path) -> ConfigFactory:
    """`make_config(**{"optim.lr": 1e-3}) -> Config`: the smoke recipe, smaller, on `shards`."""

    def make(**changes: Any) -> Config:
        values = {
            "data.shards": shards,
            "data.batch_size": 4,
            "train.runs": tmp_path / "runs",
            "train.total_steps": 12,
            "train.valid_steps": 6,
            "train.save_steps": 6,
            "train.log_steps": 2,
            "train.trackers": "[]",
            **changes,
        }
        options = [f"--{key}={value}" for key, value in values.items()]
        return parse_args(["--config", str(RECIPES / "smoke.yaml"), *options]).config

    return make


@pytest.fixture
def run(make_config: ConfigFactory, tmp_path: Path) -> Path:
    """A run folder with a best model and a last checkpoint of different random weights.

    Its speakers are those of `shards` in another order: they are to be matched by name.
    """
    config, folder = make_config(), CheckpointFolder(tmp_path / "run")
    folder.save_best(make_checkpoint(config, 5))
    folder.save(make_checkpoint(config, 9))
    return tmp_path / "run"
