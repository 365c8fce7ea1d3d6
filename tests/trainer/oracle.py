"""The model of a checkpoint, rebuilt without the code under test."""

from __future__ import annotations

from pathlib import Path

import torch
from shardprep_trainer.model.model import SpeakerModel


def model_of(file: Path) -> SpeakerModel:
    """The model that a checkpoint holds, in evaluation mode."""
    saved = torch.load(file, weights_only=True)
    speakers = len(saved["speakers"])
    model = SpeakerModel(saved["n_mels"], speakers, **saved["config"]["model"]).eval()
    model.load_state_dict(saved["model"])
    return model
