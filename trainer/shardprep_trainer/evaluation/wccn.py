"""Know speakers by the mean embeddings of their training utterances (a backend).

The classifier of a model has learned from short, changed segments. A backend compares whole
utterances with whole utterances, and lets those directions of the embeddings count for less in
which one speaker's utterances differ.

Pure NumPy. Axis legend: N utterances, S speakers, D embedding width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardprep_trainer.evaluation.trials import Ints
from shardprep_trainer.evaluation.verification import Floats, normalize, speaker_means

# Added to the covariance, as a share of its mean variance: it has D (D + 1) / 2 numbers, often more
# than there are utterances to estimate them from. From .03 to 1 it made no difference.
_RIDGE = 0.3


class Wccn:
    """Cosines with the speakers' means after within-class covariance normalisation.

    Hatch, Kajarekar and Stolcke 2006 ("Within-class covariance normalization for SVM-based speaker
    recognition", Interspeech), applied to embeddings of length 1: they are multiplied by B, where
    B B' is the inverse of the covariance of utterances about the mean of their speaker. Where no
    speaker has two different utterances there is none to be had, and the cosines are plain.

    Args:
        embeddings: (N, D), of any length, at least one of a known speaker.
        speakers: Speaker of each (N,), negative where unknown; those take no part.

    Raises:
        ValueError: No utterance has a speaker.
    """

    def __init__(self, embeddings: Floats, speakers: Ints) -> None:
        known = speakers >= 0
        if not known.any():
            raise ValueError("no utterance has a speaker")
        unit = normalize(embeddings[known])
        self.speakers, rows = np.unique(speakers[known], return_inverse=True)
        """Numbers of the S speakers, ascending: the columns of the scores."""
        self._matrix = _whiten(unit - speaker_means(unit, rows)[rows])
        self._means = normalize(speaker_means(unit @ self._matrix, rows))

    def scores(self, embeddings: Floats) -> NDArray[np.float32]:
        """The cosine (N, S) of each embedding (N, D) with each speaker."""
        return np.asarray(self.project(embeddings) @ self._means.T, np.float32)

    def project(self, embeddings: Floats) -> NDArray[np.float32]:
        """Embeddings (N, D) in the space of the scores, each of length 1."""
        return normalize(normalize(embeddings) @ self._matrix)


def _whiten(differences: Floats) -> NDArray[np.floating[Any]]:
    """A matrix B (D, D) with B B' the inverse of the covariance of differences (N, D)."""
    width = differences.shape[1]
    covariance = differences.T.astype(np.float64) @ differences / len(differences)
    variance = np.trace(covariance) / width
    # Embeddings are of length 1, in float32: less than this is rounding.
    if variance < 1e-12:
        return np.eye(width)
    covariance += _RIDGE * variance * np.eye(width)
    return np.linalg.cholesky(np.linalg.inv(covariance))
