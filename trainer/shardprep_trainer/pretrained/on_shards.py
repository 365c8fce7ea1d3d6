"""Trained models on shards: one model, or several together.

Axis legend: B batch, N utterances, K held-out utterances, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from shardprep import OpenShards, Split, UtteranceLoader
from shardprep_trainer.config.fields import Backend
from shardprep_trainer.config.scoring import Calibration, Thresholds
from shardprep_trainer.errors import PredictionError
from shardprep_trainer.evaluation.accuracy import Evaluation, Labels, collect, collect_scores
from shardprep_trainer.evaluation.combining.combination import Combination, choose, plain_mean
from shardprep_trainer.evaluation.combining.held_out import SHARE, sample
from shardprep_trainer.evaluation.combining.namer import (
    Namer,
    Namers,
    Names,
    common_speakers,
    numbers_of,
)
from shardprep_trainer.evaluation.labels import LeftOut
from shardprep_trainer.evaluation.verification import join, speaker_means
from shardprep_trainer.evaluation.views import Views
from shardprep_trainer.evaluation.wccn import Wccn
from shardprep_trainer.pretrained.batches import batches as batched
from shardprep_trainer.pretrained.progress import progress


@dataclass(frozen=True)
class Model:
    """A model on its device."""

    file: Path
    """The checkpoint."""
    step: int
    """Training steps behind the checkpoint."""
    classes: tuple[str, ...]
    """Names of its classes; those of the shards may be others."""
    is_cosine: bool
    """Whether the scores of its head are cosines."""
    backend: Backend
    """What names speakers."""
    views: Views
    """In evaluation mode."""
    thresholds: Thresholds | None
    """Of cosines, by the run's validation."""
    calibration: Calibration | None
    """Of cosines, by the run's validation."""


@dataclass(frozen=True)
class Found:
    """What the models make of the utterances of a split."""

    each: tuple[NDArray[np.float32], ...]
    """Embeddings (N, D) by each model."""
    evaluations: tuple[Evaluation, ...] = ()
    """How well each model alone named the speakers; nothing where none was to."""
    evaluation: Evaluation | None = None
    """How well all models together did; None also where they know different speakers."""
    combination: Combination | None = None
    """How several models did so."""

    @cached_property
    def embeddings(self) -> NDArray[np.float32]:
        """Embeddings (N, D): of one model as they are, of several joined."""
        return join(self.each)

    @property
    def ways(self) -> tuple[NDArray[np.float32], ...]:
        """Embeddings (N, D) by each model, and then, of several, those of all joined."""
        return self.each if len(self.each) == 1 else (*self.each, self.embeddings)


@dataclass(frozen=True)
class Inference:
    """Models on their device, and the shards that they are used on."""

    models: tuple[Model, ...]
    """In the order of their files: that of the command line changes nothing."""
    shards: OpenShards
    left_out: LeftOut | None
    """What the build of the shards left out."""
    device: torch.device
    max_frames: int
    """Largest padded area of a batch [frames]."""
    pad_value: float
    """Fills padded frames [log-mel], which never count."""
    tell: Callable[[str], None]
    """Shows a line of text to the user."""

    def split(self, name: str) -> Split:
        """Open a split.

        Raises:
            PredictionError: There is none of that name, or nothing in it.
        """
        filled = [other for other, count in self.shards.samples.items() if count]
        if name not in filled:
            what = f"{self.shards.where} has no split {name}, only {', '.join(filled)}"
            if name == "test" and (lost := self.shards.test_entries):
                what += (
                    f": the build left out all {len(lost):,} entries of testdata.json, such as "
                    f"{lost[0].file} ({lost[0].reason}); `shardprep predict` with --fill SPEAKER "
                    "writes a stand-in for each"
                )
            elif filled:
                what += f"; --split {filled[-1]} names one"
            raise PredictionError(what)
        return self.shards[name]

    @property
    def lacks_test(self) -> bool:
        """Whether the build left out every entry of testdata.json."""
        entries = self.shards.test_entries
        return bool(entries) and all(entry.index is None for entry in entries)

    @property
    def tta(self) -> int:
        """Segments of each utterance that are embedded beside the whole."""
        return self.models[0].views.segments

    @property
    def tta_frames(self) -> tuple[int, ...]:
        """Length of these segments for each model [frames], 0 where there are none."""
        return tuple(model.views.frames if self.tta else 0 for model in self.models)

    @cached_property
    def training(self) -> Found:
        """The train split, embedded.

        Raises:
            PredictionError: As `split` and `embed`.
        """
        return self.embed(self.split("train"))

    @cached_property
    def cohorts(self) -> list[NDArray[np.float64]]:
        """The mean embeddings (C, D) of the training speakers, for each of `Found.ways`.

        Raises:
            PredictionError: There are fewer than two.
        """
        has_train = self.shards.samples.get("train", 0) > 0
        labels = self.shards["train"].labels if has_train else np.empty(0, np.int64)
        # Before the long work.
        if (count := len(np.unique(labels[labels >= 0]))) < 2:
            raise PredictionError(
                f"{self.shards.where}: AS-norm needs two training speakers or more, found {count}; "
                "leave out --as-norm"
            )
        return [speaker_means(own, labels) for own in self.training.ways]

    @property
    def _enrolled(self) -> Labels:
        """The labels of the train split, whose speakers a backend knows."""
        enough = self.shards.samples.get("train", 0) > 0
        if not (enough and (self.shards["train"].labels >= 0).any()):
            raise PredictionError(
                f"{self.shards.where} has no train split with speakers, by whose utterances "
                "--backend wccn would know them; take shards that have one, or --backend head"
            )
        return self.shards["train"].labels

    @cached_property
    def known(self) -> dict[str, tuple[str, ...]]:
        """Of the file of each model the speakers that it can name, by their numbers."""
        found = {}
        for model in self.models:
            found[str(model.file)] = model.classes
            if model.backend != "head":
                labels = np.unique(self._enrolled)
                names = tuple(self.shards.speakers[label] for label in labels[labels >= 0])
                found[str(model.file)] = names
        return found

    @cached_property
    def speakers(self) -> tuple[str, ...]:
        """Names of the speakers that all models together can recognise, by their numbers.

        Raises:
            PredictionError: Models know different speakers, or the train split has none to know.
        """
        return common_speakers(self.known)

    @property
    def agree(self) -> bool:
        """Whether all models can name the same speakers."""
        return len({frozenset(names) for names in self.known.values()}) == 1

    @cached_property
    def _namers(self) -> Namers:
        found, enrolled = [], [model for model in self.models if model.backend != "head"]
        # What all models make of the train split may be asked for again, by AS-norm.
        if len(enrolled) == len(self.models):
            each = iter(self.training.each)
        else:
            each = iter(self._embed_by(enrolled, self.shards["train"]) if enrolled else ())
        for model, known in zip(self.models, self.known.values(), strict=True):
            backend = None if model.backend == "head" else Wccn(next(each), self._enrolled)
            kind = "cosines" if backend or model.is_cosine else "logits"
            found.append(Namer(known, kind, backend))
        return Namers(tuple(found), self.speakers if self.agree else ())

    def batches(self, part: Split) -> Iterator[dict[str, torch.Tensor]]:
        """The whole utterances of a split, batched by length; all of them, in every process."""
        loader = UtteranceLoader(
            part, max_frames=self.max_frames, pad_value=self.pad_value, rank=0, world_size=1
        )
        return progress(loader, len(part), part.name, lambda batch: len(batch["index"]))

    def embed(self, part: Split) -> Found:
        """Embed every utterance of a split.

        Raises:
            PredictionError: An embedding is not finite.
        """
        return Found(self._embed_by(self.models, part))

    def _embed_by(self, models: Sequence[Model], part: Split) -> tuple[NDArray[np.float32], ...]:
        found = collect(
            [model.views for model in models],
            self.batches(part),
            [np.full(len(part), -1)],
            device=self.device,
            score=lambda _, scores: scores[:1],
        )
        _check_finite(models, found.embeddings, part, np.arange(len(part)))
        return found.embeddings

    def recognise(self, part: Split, names: Names | None = None) -> Found:
        """Embed every utterance of a split and name its speaker, by each model and by all together.

        Args:
            part: The split.
            names: The speaker of each utterance (N,), None where unknown; None counts nothing.

        Raises:
            PredictionError: As `embed` and `training`, or the train split has no speakers.
        """
        names = [None] * len(part) if names is None else names
        namers = self._namers
        if len(self.models) > 1 and self.agree:
            namers = replace(namers, combination=self._combination(namers, part))
        if all(namer.backend is not None for namer in namers.each):
            each = self.training.each if part.name == "train" else self.embed(part).each
            evaluations = namers.grade(each, names)
        else:
            numbers, batches = namers.numbers(names), self.batches(part)
            found = collect(self._views, batches, numbers, device=self.device, score=namers.scores)
            each, evaluations = found.embeddings, list(found.evaluations)
            _check_finite(self.models, each, part, np.arange(len(part)))
        together = evaluations[-1] if self.agree else None
        alone = tuple(evaluations[: len(self.models)])
        return Found(each, alone, together, namers.combination)

    def _combination(self, namers: Namers, part: Split) -> Combination:
        """How the models name speakers together, chosen by some utterances of val.

        Raises:
            PredictionError: None was there to choose, and the scores are of different kinds.
        """
        kinds = [namer.kind for namer in namers.each]
        chosen, truth = self._held_out(part)
        if not len(chosen):
            if len(set(kinds)) > 1:
                raise PredictionError(
                    f"{self.shards.where} has too few utterances in val, of speakers whom the "
                    "models know, to weigh cosines of one model against logits of another; take "
                    "shards that have more, or --backend wccn"
                )
            self.tell(
                f"note: combined by the mean of {kinds[0]}: {self.shards.where} has too few "
                "utterances in val, of speakers whom the models know, to choose another way"
            )
            return plain_mean(kinds)
        val = self.shards["val"]
        mels = [val.read(position) for position in chosen.tolist()]
        batches = (
            {"mel": mel, "length": lengths, "index": torch.tensor(own)}
            for own, mel, lengths in batched(mels, self.max_frames, self.pad_value)
        )
        order, scores = collect_scores(
            self._views, batches, device=self.device, score=namers.scores
        )
        _check_finite(self.models, scores, val, chosen[order])
        found = choose(namers.aligned(scores), truth[order], kinds)
        self.tell(found.line(val.name))
        if part.name == val.name:
            self.tell(
                f"note: {val.name} has these utterances, too, so what all models together reach on "
                "it is a little too good"
            )
        return found

    def _held_out(self, part: Split) -> tuple[Labels, Labels]:
        """Positions (K,) in val of the utterances that choose, and numbers of their speakers."""
        if not self.shards.samples.get("val", 0):
            return np.empty(0, np.int64), np.empty(0, np.int64)
        val, names = self.shards["val"], self.shards.speakers
        numbers = numbers_of([names[n] if n >= 0 else None for n in val.labels], self.speakers)
        frames = int(part.frames.sum())
        if enrolled := sum(model.backend != "head" for model in self.models):
            frames += int(self.shards["train"].frames.sum()) * enrolled // len(self.models)
        chosen = sample(val.frames, np.flatnonzero(numbers >= 0), SHARE * frames)
        return chosen, numbers[chosen]

    @property
    def _views(self) -> list[Views]:
        return [model.views for model in self.models]


def _check_finite(
    models: Sequence[Model], found: Sequence[NDArray[np.float32]], part: Split, positions: Labels
) -> None:
    """Make sure that what each model made of utterances (N,) at positions of a split is finite."""
    for model, own in zip(models, found, strict=True):
        bad = np.flatnonzero(~np.isfinite(own).all(axis=1))
        if len(bad):
            raise PredictionError(
                f"{model.file}: the embeddings of {len(bad)} utterances of {part.name} are not "
                f"finite, the first is {part.keys[positions[bad[0]]]}; the run has diverged or the "
                "features are faulty: take another checkpoint, or see `shardprep verify`"
            )
