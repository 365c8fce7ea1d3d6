"""The one rule by which utterances that are too long for the model are cut.

Attention takes memory and time with the square of the frames. An utterance of more than `longest`
frames is cut into as few pieces as possible, of equal length but for one frame. Its embedding is
the mean of the pieces' embeddings, each brought to length 1 before and weighted by its frames; its
scores are the mean of their scores, weighted likewise. Other utterances are taken as they are.

Axis legend: B batch, T frames, F mel bins, D embedding width, S speakers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Run = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""From mel (B, T, F) and lengths (B,), or None for all T, to embeddings (B, D), scores (B, S)."""


def cut(frames: int, longest: int) -> list[tuple[int, int]]:
    """The pieces of an utterance.

    Args:
        frames: Its length T, at least 1.
        longest: Most frames of a piece, at least 1.

    Returns:
        First frame and end of each piece, in order; together they are range(T). One piece where
        `frames` is not more than `longest`.
    """
    count = -(-frames // longest)
    ends = [frames * number // count for number in range(count + 1)]
    return list(zip(ends[:-1], ends[1:], strict=True))


def in_pieces(run: Run, mel: Tensor, lengths: Tensor | None, longest: int) -> tuple[Tensor, Tensor]:
    """Embed and score utterances, those that are too long in pieces.

    Args:
        run: The model.
        mel: (B, T, F) log-mels.
        lengths: (B,) valid frames, or None for all T.
        longest: Most frames that the model is given.

    Returns:
        Embeddings (B, D) and scores (B, S).
    """
    batch, total, _ = mel.shape
    if total <= longest:
        return run(mel, lengths)
    ends = [total] * batch if lengths is None else lengths.tolist()
    # One after the other: a piece alone keeps any device busy, and takes gigabytes.
    found = [_one(run, row[None, :end], longest) for row, end in zip(mel, ends, strict=True)]
    embeddings, scores = zip(*found, strict=True)
    return torch.cat(embeddings), torch.cat(scores)


def _one(run: Run, mel: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """The same of one utterance, mel (1, T, F)."""
    pieces = cut(mel.shape[1], longest)
    if len(pieces) == 1:
        return run(mel, None)
    embedding = scores = torch.zeros((), device=mel.device)
    for first, end in pieces:
        own, own_scores = run(mel[:, first:end], None)
        share = (end - first) / mel.shape[1]
        embedding = embedding + share * F.normalize(own.float(), dim=1)
        scores = scores + share * own_scores
    return embedding, scores
