"""What a model says of recordings. Axis legend: T frames, D embedding width, S speakers."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Embeddings: TypeAlias = NDArray[np.float32]


class Comparison(NamedTuple):
    """Whether two recordings have one speaker."""

    cosine: float
    """Of their embeddings, -1 to 1."""
    probability: float | None
    """That the speaker is the same; None where the model has no calibration."""
    same: bool | None
    """Whether the cosine reaches the threshold of the model; None where it has none."""


class Match(NamedTuple):
    """A speaker whom the model knows, and how well an utterance fits."""

    speaker: str
    score: float
    """By the head: its cosine, or its logit where it is not a cosine head."""


class Used(NamedTuple):
    """What a model makes of one recording."""

    embedding: Embeddings
    """(D,)."""
    scores: Embeddings
    """(S,), by the head."""
    frames: int
    """Its length T, after silence was removed."""
    pieces: int
    """In how many pieces it was embedded."""
