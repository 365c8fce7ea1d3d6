"""Checkpoints that tests make, and the best model of a run folder, changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch

from shardprep_trainer.checkpoint.files import load
from shardprep_trainer.checkpoint.model_folder import write_model
from shardprep_trainer.checkpoint.state import Best, Checkpoint, Training
from shardprep_trainer.config.fields import Config
from shardprep_trainer.model.build import build_model

BEST = "model/model.safetensors"
"""The best model of a run folder."""


def make_checkpoint(config: Config, step: int, **changes: Any) -> Checkpoint:
    """A model of random weights, which the step decides."""
    torch.manual_seed(step)
    entries: dict[str, Any] = {
        "step": step,
        "best": Best(),
        "config": config,
        "speakers": ("id00002", "id00000", "id00001"),
        "n_mels": 40,
        "fingerprint": "0" * 64,
        **changes,
    }
    model = build_model(config.model, entries["n_mels"], len(entries["speakers"]))
    return Checkpoint(**{"weights": model.state_dict(), **entries})


def make_training(**changes: Any) -> Training:
    """What continuing takes, on one process, with nothing in it."""
    entries: dict[str, Any] = {
        "optimizer": {},
        "scaler": None,
        "loader": {},
        "precision": "no",
        "processes": 1,
        "global_batch": 4,
        "launchers": [],
        "meter": [],
        "raw": None,
    }
    return Training(**{**entries, **changes})


def change_best(run: Path, **changes: Any) -> Path:
    """Write the best model of a run anew, some of its entries changed; returns the file."""
    write_model(run / "model", msgspec.structs.replace(load(run / BEST), **changes))
    return run / BEST
