"""The homework's Conformer classifier, with or without the mistake of the published code.

Axis legend: B batch, T frames, F mel bins, D width, S speakers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from conformer import ConformerBlock
from torch import Tensor, nn

MARGIN, SCALE = 0.2, 30.0
AXES, KINDS = ("wrong", "right"), ("strong", "boss")


class AttentivePooling(nn.Module):
    """A mean over all frames with learned weights: (B, T, D) -> (B, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.hidden, self.score = nn.Linear(dim, dim), nn.Linear(dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Weigh and sum frames (B, T, D) -> (B, D)."""
        weights = self.score(torch.tanh(self.hidden(x))).softmax(dim=1)  # (B, T, 1)
        pooled: Tensor = (weights * x).sum(dim=1)
        return pooled


class Cosine(nn.Module):
    """Cosines with one direction a speaker: (B, D) -> (B, S)."""

    def __init__(self, dim: int, speakers: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(speakers, dim))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, embedding: Tensor) -> Tensor:
        """Cosines (B, S)."""
        return F.normalize(embedding) @ F.normalize(self.weight).T


class HomeworkModel(nn.Module):
    """The homework's Conformer classifier.

    Args:
        n_mels: Mel bins F.
        speakers: Speakers S.
        dim: Width D.
        heads: Attention heads.
        head_dim: Width of a head.
        kind: "strong" (mean pooling, one linear layer) or "boss" (attentive pooling, cosines).
        axis: "wrong" gives the block (T, B, D) as the published code does, "right" (B, T, D).
    """

    def __init__(
        self,
        n_mels: int,
        speakers: int,
        *,
        dim: int = 512,
        heads: int = 8,
        head_dim: int = 64,
        kind: str = "strong",
        axis: str = "wrong",
    ) -> None:
        super().__init__()
        self.kind, self.axis = kind, axis
        self.prenet = nn.Linear(n_mels, dim)
        self.encoder = ConformerBlock(
            dim=dim,
            dim_head=head_dim,
            heads=heads,
            ff_mult=4,
            conv_expansion_factor=2,
            conv_kernel_size=31,
            attn_dropout=0.1,
            ff_dropout=0.1,
            conv_dropout=0.1,
        )
        self.pooling = AttentivePooling(dim) if kind == "boss" else None
        self.classifier = Cosine(dim, speakers) if kind == "boss" else nn.Linear(dim, speakers)

    def embed(self, mel: Tensor) -> Tensor:
        """Pool the block's output: (B, T, F) -> (B, D)."""
        out = self.prenet(mel)
        if self.axis == "wrong":
            # The published line was meant for nn.TransformerEncoderLayer, which is not batch-first.
            out = self.encoder(out.permute(1, 0, 2)).transpose(0, 1)
        else:
            out = self.encoder(out)
        pooled: Tensor = out.mean(dim=1) if self.pooling is None else self.pooling(out)
        return pooled

    def forward(self, mel: Tensor) -> Tensor:
        """Logits or cosines: (B, T, F) -> (B, S)."""
        scores: Tensor = self.classifier(self.embed(mel))
        return scores

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of a batch: softmax, or AM-softmax for boss."""
        if self.kind == "boss":
            scores = SCALE * (scores - MARGIN * F.one_hot(labels, scores.shape[1]))
        return F.cross_entropy(scores, labels)
