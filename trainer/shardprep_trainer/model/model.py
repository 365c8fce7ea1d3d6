"""The speaker model: mel frames -> encoder -> pooling -> embedding -> a score for each speaker.

With every classifier, the predicted speaker is the argmax of `SpeakerNetwork.forward`. Padding
never counts: an utterance has the same embedding alone, padded, or beside others in a batch. (In
training, BatchNorm sees the other utterances of the batch, but not their padding.)

Axis legend: B batch, T frames, F mel bins, D width of the encoder's output, E embedding width, S
speakers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardprep_trainer.model.encoder.contract import Encoder
from shardprep_trainer.model.layers import MaskedBatchNorm1d, frame_mask, masked_mean, zero_padding
from shardprep_trainer.model.pooling import (
    AttentiveStatisticsPooling,
    MeanPooling,
    SelfAttentivePooling,
)
from shardprep_trainer.model.precision import exact_product

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
        encoder: A module that keeps the contract of `encoder.contract`.
        n_speakers: Speakers S.
        hidden: Width of the layer within an attentive pooling that weighs frames.
        pooling: "mean", "self_attentive" or "attentive_statistics".
        center: Subtract the mean frame of each utterance: a fixed filter of the channel.
        embedding_dim: Width E of the embedding; None for the width of the pooling's output.
        classifier: "linear", "mlp" (Linear, ReLU, Linear) or "cosine" (for AM-softmax).

    Raises:
        ValueError: An unknown name; it says what is allowed.
    """

    def __init__(
        self,
        encoder: nn.Module,
        n_speakers: int,
        *,
        hidden: int,
        pooling: str = "self_attentive",
        center: bool = False,
        embedding_dim: int | None = None,
        classifier: str = "cosine",
    ) -> None:
        super().__init__()
        _check_choice("pooling", pooling, POOLINGS)
        _check_choice("classifier", classifier, CLASSIFIERS)
        assert isinstance(encoder, Encoder)
        self.center = center
        self.encoder = encoder
        self.pooling = _build_pooling(pooling, encoder.width, hidden)
        width = encoder.width * (2 if pooling == "attentive_statistics" else 1)
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
        x = self.encoder(mel, mask)  # (B, T, F) -> (B, T / subsampling, D)
        mask = None if mask is None else mask[:, :: self.encoder.subsampling]
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


def _check_choice(name: str, found: str, allowed: tuple[str, ...]) -> None:
    if found not in allowed:
        raise ValueError(f"{name}: found {found!r}; allowed: {', '.join(allowed)}")
