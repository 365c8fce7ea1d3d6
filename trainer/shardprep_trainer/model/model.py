"""The speaker model: mel frames -> encoder -> pooling -> embedding -> a score for each speaker.

With every classifier, the predicted speaker is the argmax of `SpeakerNetwork.forward`. Padding
never counts: an utterance has the same embedding alone, padded, or beside others in a batch. (In
training, BatchNorm sees the other utterances of the batch, but not their padding.)

Axis legend: B batch, T frames, F mel bins, D model width, E embedding width (D unless the recipe
says otherwise), H heads, S speakers, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardprep_trainer.model.blocks import ConformerBlock, TransformerBlock
from shardprep_trainer.model.layers import MaskedBatchNorm1d, frame_mask, masked_mean, zero_padding
from shardprep_trainer.model.pooling import (
    AttentiveStatisticsPooling,
    MeanPooling,
    SelfAttentivePooling,
)
from shardprep_trainer.model.precision import exact_product
from shardprep_trainer.model.stem import build_stem

ENCODERS = ("conformer", "transformer")
POOLINGS = ("mean", "self_attentive", "attentive_statistics")
CLASSIFIERS = ("linear", "mlp", "cosine")


class CosineClassifier(nn.Module):
    """Cosines of an embedding with a learned direction for each speaker (arXiv 1801.05599, sec. 3).

    It has no bias, scale or margin: those belong to the loss. It computes in float32 at least, also
    under autocast or with TensorFloat-32: half precision cannot distinguish cosines closer than
    5e-4.

    Args:
        dim: Embedding width D.
        speakers: Number of speakers S.
    """

    def __init__(self, dim: int, speakers: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(speakers, dim))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, embedding: Tensor) -> Tensor:
        """Map embeddings (B, D) of any norm to cosines (B, S) in -1..1."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(embedding.device.type, enabled=False):
            features = F.normalize(embedding.to(dtype), dim=1)
            directions = F.normalize(self.weight.to(dtype), dim=1)
            # Only CUDA may compute products of float32 matrices in a lower precision.
            if features.is_cuda:
                return exact_product(features, directions)
            return features @ directions.T


class Embedding(nn.Module):
    """From the output of pooling to an embedding of another width: BatchNorm, then one matrix.

    Args:
        pooled: Width P of the output of pooling.
        dim: Embedding width E.
    """

    def __init__(self, pooled: int, dim: int) -> None:
        super().__init__()
        self.norm = MaskedBatchNorm1d(pooled)
        self.linear = nn.Linear(pooled, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, P) to (B, E), float32 at least, autocast or not."""
        # BatchNorm accepts a batch of one utterance only with a mask.
        all_valid = x.new_ones((len(x), 1), dtype=torch.bool)
        with torch.autocast(x.device.type, enabled=False):
            out: Tensor = self.linear(self.norm(x.unsqueeze(2), all_valid).squeeze(2))
            return out


class SpeakerNetwork(nn.Module):
    """An encoder of mel frames with a pooling layer and a classifier of speakers.

    Args:
        n_mels: Mel bins F.
        n_speakers: Speakers S.
        encoder: "conformer" or "transformer".
        dim: Model width D.
        layers: Encoder blocks.
        heads: Attention heads H of each block.
        head_dim: Width of one head; None for dim / heads. A Transformer allows no other.
        ff_dim: Feed-forward width of each block; for a Conformer a multiple of dim.
        conv_expansion: Width of the convolution in multiples of dim; Conformer only.
        kernel_size: Length of the depthwise convolution [frames], odd; Conformer only.
        dropout: Probability of every dropout in the encoder.
        pooling: "mean", "self_attentive" or "attentive_statistics".
        center: Subtract the mean frame of each utterance: a fixed filter of the channel.
        subsampling: 1, or 2 for a front end that halves the rate of the frames.
        stem_channels: Channels of the convolutions of a `ConvolutionalStem`; 0 for a matrix alone.
        concat: Pool the outputs of all blocks side by side (MFA-Conformer, arXiv 2203.15249).
        embedding_dim: Width of the embedding; None for the width of the pooling's output.
        classifier: "linear", "mlp" (Linear, ReLU, Linear) or "cosine" (for AM-softmax).

    Raises:
        ValueError: An unknown name, or sizes that do not fit; it says what is allowed.
    """

    def __init__(
        self,
        n_mels: int,
        n_speakers: int,
        *,
        encoder: str = "conformer",
        dim: int = 512,
        layers: int = 1,
        heads: int = 8,
        head_dim: int | None = None,
        ff_dim: int = 2048,
        conv_expansion: int = 2,
        kernel_size: int = 31,
        dropout: float = 0.1,
        pooling: str = "self_attentive",
        center: bool = False,
        subsampling: int = 1,
        stem_channels: int = 0,
        concat: bool = False,
        embedding_dim: int | None = None,
        classifier: str = "cosine",
    ) -> None:
        super().__init__()
        _check_choice("encoder", encoder, ENCODERS)
        _check_choice("pooling", pooling, POOLINGS)
        _check_choice("classifier", classifier, CLASSIFIERS)
        _check_positive(
            n_mels=n_mels,
            n_speakers=n_speakers,
            dim=dim,
            layers=layers,
            heads=heads,
            head_dim=1 if head_dim is None else head_dim,
            ff_dim=ff_dim,
            conv_expansion=conv_expansion,
            kernel_size=kernel_size,
            embedding_dim=1 if embedding_dim is None else embedding_dim,
        )
        if stem_channels < 0:
            raise ValueError(f"stem_channels: found {stem_channels}; allowed: 0 or more")
        if subsampling not in (1, 2):
            raise ValueError(f"subsampling: found {subsampling}; allowed: 1 or 2")
        self.center = center
        self.subsampling = subsampling
        self.concat = concat
        self.prenet = build_stem(n_mels, dim, stem_channels, subsampling)
        build: Callable[..., nn.Module] = _transformer_block
        if encoder == "conformer":
            build = partial(_conformer_block, conv_expansion, kernel_size)
        self.blocks = nn.ModuleList(
            build(dim, heads, head_dim, ff_dim, dropout) for _ in range(layers)
        )
        width = dim * layers if concat else dim
        self.joined_norm = nn.LayerNorm(width) if concat else nn.Identity()
        self.pooling = _build_pooling(pooling, width, dim)
        width *= 2 if pooling == "attentive_statistics" else 1
        self.embedding: nn.Module = nn.Identity()
        if embedding_dim is not None:
            self.embedding, width = Embedding(width, embedding_dim), embedding_dim
        self.classifier = _build_classifier(classifier, width, n_speakers)

    def embed(self, mel: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Embed utterances.

        Args:
            mel: (B, T, F) log-mels of any floating dtype. Padded frames may hold anything.
            lengths: (B,) valid frames of each utterance, at least 1; the rest is padding. None
                means that all T are valid, and saves the work of masking. Lengths that are all T
                give the same embedding, but save nothing: the host would have to wait for the
                device to look at them.

        Returns:
            (B, E) embedding, float32 (float64 if the model is).
        """
        if lengths is not None:
            lengths = lengths.to(mel.device, non_blocking=True)
        mask = frame_mask(lengths, mel.shape[1])  # (B, T)
        # Zero the padding before the first product: NaN times a gradient of zero is NaN.
        mel = zero_padding(mel.to(next(self.parameters()).dtype), mask)
        if self.center:
            mel = zero_padding(mel - masked_mean(mel, mask), mask)
        # Under autocast only products are in 16 bits; the sum over the blocks stays in float32.
        x = self.prenet(mel, mask).to(torch.promote_types(mel.dtype, torch.float32))
        mask = None if mask is None else mask[:, :: self.subsampling]
        outputs = []
        for block in self.blocks:
            x = block(x, mask)
            outputs.append(x)
        if self.concat:
            x = self.joined_norm(torch.cat(outputs, dim=2))  # (B, T, D) each -> (B, T, L * D)
        embedding: Tensor = self.embedding(self.pooling(x, mask))
        return embedding

    def forward(self, mel: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Score utterances against every speaker.

        Args:
            mel: (B, T, F), see `embed`.
            lengths: (B,) or None, see `embed`.

        Returns:
            (B, S) logits, or cosines if the classifier is "cosine"; float32 (float64 if the model
            is). The argmax over S is the prediction.
        """
        embedding = self.embed(mel, lengths)
        scores: Tensor = self.classifier(embedding)
        return scores.to(embedding.dtype)


def _build_pooling(name: str, width: int, hidden: int) -> nn.Module:
    if name == "mean":
        return MeanPooling()
    if name == "self_attentive":
        return SelfAttentivePooling(width, hidden)
    return AttentiveStatisticsPooling(width, hidden)


def _build_classifier(name: str, dim: int, speakers: int) -> nn.Module:
    if name == "cosine":
        return CosineClassifier(dim, speakers)
    if name == "linear":
        return nn.Linear(dim, speakers)
    return nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, speakers))


def _conformer_block(
    conv_expansion: int,
    kernel_size: int,
    dim: int,
    heads: int,
    head_dim: int | None,
    ff_dim: int,
    dropout: float,
) -> nn.Module:
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size: found {kernel_size}; allowed: an odd number of frames")
    if ff_dim % dim:
        raise ValueError(
            f"ff_dim: found {ff_dim} in a conformer of dim {dim}; allowed: a multiple of dim"
        )
    if head_dim is None:
        _check_divisible(dim, heads)
    return ConformerBlock(
        dim=dim,
        dim_head=dim // heads if head_dim is None else head_dim,
        heads=heads,
        ff_mult=ff_dim // dim,
        conv_expansion_factor=conv_expansion,
        conv_kernel_size=kernel_size,
        attn_dropout=dropout,
        ff_dropout=dropout,
        conv_dropout=dropout,
    )


def _transformer_block(
    dim: int, heads: int, head_dim: int | None, ff_dim: int, dropout: float
) -> nn.Module:
    _check_divisible(dim, heads)
    if head_dim not in (None, dim // heads):
        allowed = f"{dim // heads} (dim / heads) or none"
        raise ValueError(f"head_dim: found {head_dim} in a transformer; allowed: {allowed}")
    return TransformerBlock(dim=dim, heads=heads, ff_dim=ff_dim, dropout=dropout)


def _check_divisible(dim: int, heads: int) -> None:
    if dim % heads:
        raise ValueError(f"dim: found {dim}, with heads {heads}; allowed: a multiple of heads")


def _check_choice(name: str, found: str, allowed: tuple[str, ...]) -> None:
    if found not in allowed:
        raise ValueError(f"{name}: found {found!r}; allowed: {', '.join(allowed)}")


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: found {size}; allowed: 1 or more")
