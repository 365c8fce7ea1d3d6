"""The way into a model: from its configuration to the network, from a batch to its inputs.

Axis legend: B batch, T frames, F mel bins.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from shardprep_trainer.config.encoders import BLOCKS
from shardprep_trainer.config.fields import ModelConfig
from shardprep_trainer.model.blocks import ConformerBlock, TransformerBlock
from shardprep_trainer.model.encoder.named import build_named
from shardprep_trainer.model.encoder.stack import BlockStack
from shardprep_trainer.model.model import SpeakerNetwork


def build_model(
    config: ModelConfig, n_mels: int, n_speakers: int, named: Collection[str] = ()
) -> SpeakerNetwork:
    """Build the network; its weights are drawn from torch's global generator.

    Args:
        config: A checked configuration.
        n_mels: Mel bins F.
        n_speakers: Speakers of the head.
        named: Names of encoders that the user wrote: an encoder that does not come with the
            trainer is imported only if it is one of them.

    Raises:
        EncoderError: The encoder is such a class and not named, or is none by the contract.
    """
    return SpeakerNetwork(
        _build_encoder(config, n_mels, named),
        n_speakers,
        hidden=config.dim,
        pooling=config.pooling,
        center=config.center,
        embedding_dim=config.embedding_dim,
        classifier=config.classifier,
    )


def _build_encoder(config: ModelConfig, n_mels: int, named: Collection[str]) -> nn.Module:
    if config.encoder not in BLOCKS:
        return build_named(config.encoder, config.encoder_options, n_mels, named)
    return BlockStack(
        n_mels,
        _block_of(config),
        dim=config.dim,
        layers=config.layers,
        subsampling=config.subsampling,
        stem_channels=config.stem_channels,
        concat=config.concat,
    )


def _block_of(config: ModelConfig) -> Callable[[], nn.Module]:
    if config.encoder == "transformer":
        return partial(
            TransformerBlock,
            dim=config.dim,
            heads=config.heads,
            ff_dim=config.ff_dim,
            dropout=config.dropout,
        )
    return partial(
        ConformerBlock,
        dim=config.dim,
        dim_head=config.head_dim,
        heads=config.heads,
        ff_mult=config.ff_dim // config.dim,
        conv_expansion_factor=config.conv_expansion,
        conv_kernel_size=config.kernel_size,
        attn_dropout=config.dropout,
        ff_dropout=config.dropout,
        conv_dropout=config.dropout,
    )


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
