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


def model_inputs(
    batch: Mapping[str, Tensor], device: torch.device, padded: bool | None = None
) -> tuple[Tensor, Tensor | None]:
    """Move a batch to the device, in float32.

    Args:
        batch: `mel` (B, T, F), on any device, and `length` (B,) on the CPU.
        device: Where the model is.
        padded: Whether the lengths are given; None gives them where something is padded.

    Returns:
        mel (B, T, F) float32 and lengths (B,). By default the lengths are None where nothing is
        padded: the CPU knows this without waiting for the device, and the model then needs no mask.
    """
    mel, length = batch["mel"], batch["length"]
    if padded is None:
        padded = bool((length < mel.shape[1]).any())
    lengths = length.to(device, non_blocking=True) if padded else None
    return mel.to(device, non_blocking=True).float(), lengths
