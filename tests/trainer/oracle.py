"""The model of a checkpoint, rebuilt without the code under test."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from shardprep_trainer.config.fields import ModelConfig
from shardprep_trainer.model.build import build_model
from shardprep_trainer.model.model import SpeakerNetwork


def model_of(file: Path) -> SpeakerNetwork:
    """The model that a checkpoint or a model file holds, in evaluation mode."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            saved = json.loads(opened.metadata()["description"])
        weights = load_file(file)
    else:
        saved = torch.load(file, weights_only=True)
        weights = saved["weights"]
    speakers = len(saved["speakers"])
    config = ModelConfig(**saved["config"]["model"])
    model = build_model(config, saved["n_mels"], speakers, (config.encoder,)).eval()
    model.load_state_dict(weights)
    return model
