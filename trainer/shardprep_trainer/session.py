"""A trained model in front of the shards that it is to hear."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from shardprep import ShardSet, Split, UtteranceLoader
from shardprep_trainer.config.fields import Backend
from shardprep_trainer.errors import PredictionError
from shardprep_trainer.evaluation.accuracy import Collected, Labels, collect, grade
from shardprep_trainer.evaluation.rejects import LeftOut
from shardprep_trainer.evaluation.views import Views
from shardprep_trainer.evaluation.wccn import Wccn


@dataclass(frozen=True)
class Session:
    """A model on its device, and the shards it is to hear."""

    file: Path
    """The checkpoint."""
    step: int
    """Training steps behind the checkpoint."""
    classes: tuple[str, ...]
    """Names of the model's classes; those of the shards may be others."""
    backend: Backend
    """What names speakers."""
    views: Views
    """The model, in evaluation mode."""
    shards: ShardSet
    left_out: LeftOut | None
    """What the build of the shards left out."""
    device: torch.device
    max_frames: int
    """Largest padded area of a batch [frames]."""
    pad_value: float
    """Fills padded frames [log-mel]."""

    def split(self, name: str) -> Split:
        """Open a split.

        Raises:
            PredictionError: There is none of that name, or nothing in it.
        """
        splits = self.shards.manifest.splits
        filled = [other for other, part in splits.items() if part.samples]
        if name not in filled:
            raise PredictionError(
                f"{self.shards.path} has no split {name}, only {', '.join(filled)}"
            )
        return self.shards[name]

    @cached_property
    def training(self) -> Collected:
        """The train split, heard.

        Raises:
            PredictionError: As `split` and `hear`.
        """
        return self.hear(self.split("train"))

    @cached_property
    def _enrolled(self) -> Wccn:
        train = self.shards.manifest.splits.get("train")
        if train is None or not train.samples or not (self.shards["train"].labels >= 0).any():
            raise PredictionError(
                f"{self.shards.path} has no train split with speakers, by whose utterances "
                "--backend wccn would know them; take shards that have one, or --backend head"
            )
        return Wccn(self.training.embeddings, self.shards["train"].labels)

    @cached_property
    def speakers(self) -> tuple[str, ...]:
        """Names of the speakers that can be recognised, by their numbers."""
        if self.backend == "head":
            return self.classes
        return tuple(self.shards.speakers[number] for number in self._enrolled.speakers)

    def batches(self, part: Split) -> UtteranceLoader:
        """The whole utterances of a split, batched by length."""
        return UtteranceLoader(part, max_frames=self.max_frames, pad_value=self.pad_value)

    def hear(self, part: Split, classes: Labels | None = None) -> Collected:
        """Embed every utterance of a split, and classify it by the head of the model.

        Args:
            part: The split.
            classes: The model's number of each utterance's speaker (N,), -1 where it has none;
                None counts nothing. Not the split's labels: those number the shards' speakers.

        Raises:
            PredictionError: An embedding is not finite.
        """
        labels = np.full(len(part), -1) if classes is None else classes
        found = collect(self.views, self.batches(part), labels, device=self.device)
        bad = np.flatnonzero(~np.isfinite(found.embeddings).all(axis=1))
        if len(bad):
            raise PredictionError(
                f"{self.file}: the embeddings of {len(bad)} utterances of {part.name} are not "
                f"finite, the first is {part.keys[bad[0]]}; the run has diverged or the features "
                "are faulty: take another checkpoint, or see `shardprep verify`"
            )
        return found

    def recognise(self, part: Split, speakers: Labels | None = None) -> Collected:
        """Embed every utterance of a split and name its speaker by the backend.

        Args:
            part: The split.
            speakers: Number of each utterance's speaker (N,) in `Session.speakers`, -1 where it is
                not among them; None counts nothing.

        Raises:
            PredictionError: As `hear` and `training`, or the train split has no speakers.
        """
        if self.backend == "head":
            return self.hear(part, speakers)
        enrolled = self._enrolled
        found = self.training if part.name == "train" else self.hear(part)
        numbers = np.full(len(part), -1) if speakers is None else speakers
        return Collected(found.embeddings, grade(enrolled.scores, found.embeddings, numbers))
