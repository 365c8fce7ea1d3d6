"""The speakers that a model learns: those of the train split, numbered without gaps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardprep import OpenShards

Labels = NDArray[np.signedinteger[Any]]


@dataclass(frozen=True)
class Speakers:
    """The S speakers of the head. A set may have more: some occur only in other splits."""

    names: tuple[str, ...]
    """By their numbers in the head (S,)."""
    numbers: NDArray[np.int64]
    """The number in the head of each speaker of the shards; -1 for one who is not in train."""

    @property
    def all_of_the_shards(self) -> bool:
        """Whether the head numbers the speakers as the shards do."""
        return len(self.names) == len(self.numbers)

    def of(self, labels: Labels) -> NDArray[np.int64]:
        """The numbers in the head (N,) of utterances with these labels of the shards (N,)."""
        return self.numbers[labels]


def speakers_of(shards: OpenShards) -> Speakers:
    """The speakers who occur in the train split, in the order of the shards' labels."""
    present = np.zeros(len(shards.speakers), bool)
    present[shards["train"].labels] = True
    numbers = np.where(present, np.cumsum(present) - 1, -1)
    return Speakers(tuple(shards.speakers[label] for label in np.flatnonzero(present)), numbers)
