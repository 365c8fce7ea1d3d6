"""Who names speakers: of each model its head or its backend. Which speakers all of them know.

Axis legend: B batch, N utterances, D embedding width, S speakers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardprep_trainer.errors import PredictionError
from shardprep_trainer.evaluation.accuracy import Evaluation, Labels, Tensors, grade
from shardprep_trainer.evaluation.combining.combination import Combination, Scores
from shardprep_trainer.evaluation.wccn import Wccn

Names = Sequence[str | None]
"""The speaker of each utterance, None where unknown."""
Known = Mapping[str, tuple[str, ...]]
"""Of each model, by its name in messages, the speakers that it can name, by their numbers."""


@dataclass(frozen=True)
class Namer:
    """What names a speaker by one model."""

    speakers: tuple[str, ...]
    """Their names, by their numbers: the columns of the scores."""
    kind: str
    """What the scores are, cosines or logits."""
    backend: Wccn | None
    """None is the head of the model."""

    def scores(self, embeddings: Tensor, scores: Tensor) -> Tensor:
        """Score speakers (B, S).

        Args:
            embeddings: (B, D), by the model.
            scores: (B, S), by its head.
        """
        if self.backend is None:
            return scores
        return torch.from_numpy(self.backend.scores(embeddings.cpu().numpy())).to(scores.device)


@dataclass(frozen=True)
class Namers:
    """Those of one or several models."""

    each: tuple[Namer, ...]
    speakers: tuple[str, ...] = ()
    """Whom they name together, by their numbers; nobody where they know different speakers."""
    combination: Combination | None = None
    """How they do; None of one model, or where they know different speakers."""

    def numbers(self, names: Names) -> list[Labels]:
        """The number of each speaker (N,) for each way of `scores`; -1 where there is none."""
        found = [numbers_of(names, namer.speakers) for namer in self.each]
        return found if self.combination is None else [*found, numbers_of(names, self.speakers)]

    def scores(self, embeddings: Tensors, scores: Tensors) -> Tensors:
        """Scores (B, S) by each model alone, and then by all together if they are combined."""
        found = [
            namer.scores(*own) for namer, *own in zip(self.each, embeddings, scores, strict=True)
        ]
        if self.combination is None:
            return found
        return [*found, self.combination(self.aligned(found))]

    def aligned(self, scores: Sequence[Scores]) -> list[Scores]:
        """Scores (B, S) of each model, their columns in the order of the common speakers."""
        return [
            own[:, numbers_of(self.speakers, namer.speakers)]
            for namer, own in zip(self.each, scores, strict=True)
        ]

    def grade(self, embeddings: Sequence[NDArray[np.float32]], names: Names) -> list[Evaluation]:
        """The evaluation by each way of `scores`, where no head names speakers.

        Args:
            embeddings: By each model (N, D).
            names: The speaker of each utterance (N,), None where unknown.
        """
        backends = [namer.backend for namer in self.each if namer.backend is not None]
        parts = np.cumsum([own.shape[1] for own in embeddings])[:-1]

        def together(block: NDArray[np.float32]) -> NDArray[np.float32]:
            assert self.combination is not None
            each = zip(backends, np.split(block, parts, axis=1), strict=True)
            return self.combination(self.aligned([backend.scores(own) for backend, own in each]))

        numbers = self.numbers(names)
        found = [
            grade(backend.scores, own, labels)
            for backend, own, labels in zip(backends, embeddings, numbers, strict=False)
        ]
        if self.combination is not None:
            found.append(grade(together, np.concatenate(embeddings, axis=1), numbers[-1]))
        return found


def common_speakers(known: Known) -> tuple[str, ...]:
    """The speakers whom all models know: of one model as it numbers them, else by their names.

    Raises:
        PredictionError: The models know different speakers.
    """
    (first, names), *others = known.items()
    for other, theirs in others:
        for one, own, two, more in ((first, names, other, theirs), (other, theirs, first, names)):
            if lacking := sorted(set(more) - set(own)):
                raise PredictionError(
                    f"{one} does not know {len(lacking):,} of the speakers whom {two} knows, such "
                    f"as {lacking[0]}; models name speakers together only where they know the "
                    "same: take others, or --backend wccn, which knows the speakers of the shards"
                )
    return tuple(sorted(names)) if others else names


def numbers_of(names: Names, known: Sequence[str]) -> NDArray[np.int64]:
    """The number among those who are known of each name (N,); -1 where it has none."""
    numbers = {name: number for number, name in enumerate(known)}
    return np.array([-1 if name is None else numbers.get(name, -1) for name in names], np.int64)
