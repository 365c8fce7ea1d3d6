"""Validation: accuracy and trials of the val split, and which model is the best.

Where val has speakers whom train lacks, no head knows them, and trials among them tell what a model
is worth on new voices. Then the equal error rate chooses the best model, else the accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from shardprep import OpenShards
from shardprep_trainer.checkpoint.state import Best
from shardprep_trainer.config.scoring import Calibration
from shardprep_trainer.errors import ConfigError
from shardprep_trainer.evaluation.accuracy import Criterion, Evaluation, evaluate
from shardprep_trainer.evaluation.calibration import fit_calibration
from shardprep_trainer.evaluation.trials import Bools, Trials, draw_trials, possible_trials
from shardprep_trainer.evaluation.verification import Floats, Verified, cosine_scores, judge
from shardprep_trainer.run.speakers import Labels, Speakers

# Not the run's: runs of any seed are compared by the same trials.
_SEED = 0


@dataclass(frozen=True)
class Validated:
    """What one validation found."""

    evaluation: Evaluation
    """Over the utterances whose speakers the head knows."""
    scores: Floats | None
    """Cosines (K,) of the trials; None where there are none."""
    target: Bools | None
    """Whether the speaker is the same (K,)."""
    verified: Verified | None
    """What the scores say; None where there are none, or where one is not finite."""

    @property
    def accuracy(self) -> float | None:
        """Share of the utterances that were recognised; None where the head knows no speaker."""
        return self.evaluation.accuracy if self.evaluation.labelled else None

    @property
    def eer(self) -> float | None:
        """Equal error rate of the trials."""
        return None if self.verified is None else self.verified.eer

    @property
    def calibration(self) -> Calibration | None:
        """The calibration of a cosine by all of these trials."""
        if self.verified is None or self.scores is None or self.target is None:
            return None
        return fit_calibration(self.scores, self.target)


@dataclass(frozen=True)
class Validation:
    """What is measured at each validation of a run."""

    labels: Labels
    """Number in the head of the speaker of each utterance of val (N,); -1 where it has none."""
    trials: Trials | None
    """The same at each validation, of positions among `utterances`."""
    utterances: Labels | None
    """Positions in val of the utterances of the trials (U,)."""
    strangers: int
    """Speakers of val whom train lacks."""
    by_eer: bool
    """Whether the trials are among these speakers, and choose the best model."""

    def __call__(
        self,
        model: nn.Module,
        batches: Iterable[Mapping[str, Tensor]],
        *,
        device: torch.device,
        criterion: Criterion,
        reduce: Callable[[Tensor], Tensor],
        incomplete: bool,
    ) -> Validated:
        """Measure a model; see `evaluate` for the arguments. Every rank gets the same."""
        found = evaluate(
            model,
            batches,
            self.labels,
            device=device,
            criterion=criterion,
            reduce=reduce,
            incomplete=incomplete,
            keep=self.utterances,
        )
        trials, embeddings = self.trials, found.embeddings
        if trials is None or embeddings is None:
            return Validated(found, None, None, None)
        present = found.predictions[self.utterances] >= 0
        # A damaged utterance that was left out leaves its trials out, too.
        both = present[trials.enroll] & present[trials.test]
        trials = Trials(trials.enroll[both], trials.test[both], trials.target[both])
        scores = cosine_scores(embeddings, trials)
        judged = trials.target.any() and not trials.target.all() and np.isfinite(scores).all()
        verified = judge(scores, trials.target) if judged else None
        return Validated(found, scores, trials.target, verified)

    def is_better(self, found: Validated, best: Best) -> bool:
        """Whether a model is the best so far.

        A later model that is equally good replaces the best: it has been trained for longer.
        """
        if self.by_eer:
            return found.eer is not None and (best.eer is None or found.eer <= best.eer)
        accuracy = found.accuracy
        return accuracy is not None and (best.accuracy is None or accuracy >= best.accuracy)

    def describe(self, found: Validated) -> str:
        """What was found, for people."""
        parts = []
        counts = found.evaluation
        if counts.labelled:
            right = f"{counts.correct:,} of {counts.labelled:,}"
            parts.append(f"accuracy {counts.accuracy:.4f} ({right}), loss {counts.loss:.4f}")
        if found.verified is not None:
            of = f"{found.verified.trials:,} trials" + (" of new speakers" if self.by_eer else "")
            parts.append(f"EER {100 * found.verified.eer:.2f} % ({of})")
        return ", ".join(parts) or "no trial has a score that is a finite number"


def plan_validation(shards: OpenShards, speakers: Speakers, wanted: int) -> Validation:
    """Choose what is measured: a function of the shards and of the number of trials alone.

    Args:
        shards: With a split val, all of whose speakers are known by name.
        speakers: The speakers of the head.
        wanted: Trials, half of them of one speaker; fewer where the speakers make fewer.

    Raises:
        ConfigError: Nothing could choose the best model.
    """
    own = shards["val"].labels
    labels = speakers.of(own)
    new = labels < 0
    trials = _draw(np.where(new, own, -1), wanted) if new.any() else None
    by_eer = trials is not None
    if trials is None:
        trials = _draw(own, wanted)
    if new.all() and not by_eer:
        raise ConfigError(
            f"train.valid_trials: found {wanted}, but val of {shards.where} has only speakers whom "
            "train lacks, so that there is no accuracy; allowed is 2 or more where val has two "
            "such speakers or more, and two utterances of one of them. Or do without validation: "
            "--train.valid_steps 0"
        )
    utterances = None
    if trials is not None:
        utterances, places = np.unique(
            np.concatenate((trials.enroll, trials.test)), return_inverse=True
        )
        enroll, test = places.reshape(2, -1)
        trials = Trials(enroll, test, trials.target)
    return Validation(labels, trials, utterances, len(np.unique(own[new])), by_eer)


def _draw(speakers: Labels, wanted: int) -> Trials | None:
    """Trials among utterances of these speakers (N,), negative for one that takes no part."""
    each = min(wanted // 2, *possible_trials(speakers))
    return draw_trials(speakers, each, each, _SEED) if each else None
