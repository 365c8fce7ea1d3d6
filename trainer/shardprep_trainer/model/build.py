"""The way into a model: from its configuration to the network, from a batch to its inputs.

Axis legend: B batch, T frames, F mel bins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import torch
from torch import Tensor

from shardprep_trainer.config.fields import ModelConfig
from shardprep_trainer.model.model import SpeakerNetwork


def build_model(config: ModelConfig, n_mels: int, n_speakers: int) -> SpeakerNetwork:
    """Build the network; its weights are drawn from torch's global generator."""
    return SpeakerNetwork(n_mels, n_speakers, **asdict(config))


def model_inputs(batch: Mapping[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Move a batch to the device, in float32.

    Args:
        batch: `mel` (B, T, F), on any device, and `length` (B,) on the CPU.
        device: Where the model is.

    Returns:
        mel (B, T, F) float32 and lengths (B,). The lengths are None where nothing is padded: the
        CPU knows this without waiting for the device, and the model then needs no mask.
    """
    mel, length = batch["mel"], batch["length"]
    padded = bool((length < mel.shape[1]).any())
    lengths = length.to(device, non_blocking=True) if padded else None
    return mel.to(device, non_blocking=True).float(), lengths
