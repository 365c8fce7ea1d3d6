"""What `shardprep score` prints: accuracies, and what the scores of trials say.

Axis legend: K trials.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from shardprep_trainer.config.scoring import Calibration, Thresholds
from shardprep_trainer.evaluation.calibration import (
    FOLDS,
    calibrate_by_others,
    cllr,
    fit_calibration,
    linked_speakers,
    min_cllr,
)
from shardprep_trainer.evaluation.combining.combination import Combination
from shardprep_trainer.evaluation.score_files import read_scores, write_scores
from shardprep_trainer.evaluation.trial_lists import read_list
from shardprep_trainer.evaluation.trials import Ints, Trials
from shardprep_trainer.evaluation.verification import P_TARGET, Floats, error_rates, judge

Sides = tuple[Sequence[str], Sequence[str]]


@dataclass(frozen=True)
class TrialReport:
    """What is printed of trials; None where there are none."""

    trials: int = 0
    target_trials: int = 0
    trials_from: str | None = None
    """The list they come from, or the seed that drew them."""
    eer: float | None = None
    """Equal error rate, 0 to 1."""
    eer_threshold: float | None = None
    """Score at or above which a trial is accepted, for this rate."""
    min_dcf: float | None = None
    min_dcf_threshold: float | None = None
    p_target: float = P_TARGET
    cllr: float | None = None
    """Cost of the ratios of trials, each calibrated by trials of other speakers [bits]; None also
    where there are too few speakers."""
    min_cllr: float | None = None
    """What a perfect calibration would leave of it [bits]."""
    calibration: Calibration | None = None
    """By all of these trials, for scores of others."""

    def lines(self) -> list[str]:
        """The same for people."""
        if self.eer is None:
            return []
        lines = [
            f"EER: {100 * self.eer:.2f} % (threshold {self.eer_threshold:.4f})",
            f"minDCF({self.p_target}): {self.min_dcf:.4f} (threshold {self.min_dcf_threshold:.4f})",
        ]
        if self.cllr is not None:
            how = f"each trial calibrated by trials of other speakers, {FOLDS} parts"
            lines.append(f"Cllr: {self.cllr:.4f}, minCllr: {self.min_cllr:.4f} ({how})")
        kinds = f"{self.target_trials:,} of one speaker; {self.trials_from}"
        return [*lines, f"trials: {self.trials:,} ({kinds})"]


def report_trials(
    scores: NDArray[np.float64],
    trials: Trials,
    source: str,
    speakers: Ints | None = None,
    sides: Sides | None = None,
    out: Path | None = None,
) -> TrialReport:
    """Judge the scores of trials, and write them to a file.

    Args:
        scores: (K,), finite.
        trials: The trials, of both kinds.
        source: Where they come from, for people.
        speakers: Speaker of each utterance (N,), negative where unknown; where one of the trials
            is, or None, utterances that target trials link are of one speaker.
        sides: Names of the utterances of the trials; None numbers them.
        out: The file; None writes none. Its log-likelihood ratios are by trials of other speakers;
            there are none where the speakers are too few.

    Raises:
        StorageError: The disk refused.
    """
    found, target = judge(scores, trials.target), trials.target
    pairs = linked_speakers(trials)
    if speakers is not None:
        known = speakers[trials.enroll], speakers[trials.test]
        pairs = known if min(side.min() for side in known) >= 0 else pairs
    llrs = calibrate_by_others(scores, target, pairs)
    if out is not None:
        places = (trials.enroll.tolist(), trials.test.tolist())
        sides = sides or ([str(place) for place in places[0]], [str(place) for place in places[1]])
        write_scores(out, sides, scores, target, llrs)
    return TrialReport(
        trials=found.trials,
        target_trials=found.target_trials,
        trials_from=source,
        eer=found.eer,
        eer_threshold=found.thresholds.eer,
        min_dcf=found.min_dcf,
        min_dcf_threshold=found.thresholds.min_dcf,
        cllr=None if llrs is None else cllr(llrs, target),
        min_cllr=min_cllr(scores, target),
        calibration=fit_calibration(scores, target),
    )


def report_file(file: Path, trials: Path | None, out: Path | None) -> TrialReport:
    """Judge the scores that another program gave to trials; see `report_trials`.

    Args:
        file: The scores.
        trials: The list of the trials; None takes the labels in the file.
        out: Where every trial is written with its score.

    Raises:
        PredictionError: A file is faulty, or a trial has no score.
        StorageError: The disk refused.
    """
    given = read_scores(file)
    if trials is None:
        scores, found = given.labelled()
        return report_trials(scores, found, str(file), None, given.sides, out)
    wanted = read_list(trials)
    scores, found = given.of(wanted)
    return report_trials(scores, found, str(trials), None, (wanted.enroll, wanted.test), out)


@dataclass(frozen=True)
class RunReport:
    """What the thresholds and the calibration that a run chose do to other trials."""

    threshold: float
    """Of the equal error rate at the run's validation."""
    miss: float
    """Share of the target trials that it rejects."""
    alarm: float
    """Share of the other trials that it accepts."""
    cllr: float
    """Cost of the ratios by the run's calibration [bits]."""

    def line(self) -> str:
        """The same for people."""
        return (
            f"as the run chose by its validation: threshold {self.threshold:.4f} misses "
            f"{100 * self.miss:.2f} %, accepts {100 * self.alarm:.2f} % of the others; Cllr "
            f"{self.cllr:.4f}"
        )


def report_run(
    scores: Floats, trials: Trials, thresholds: Thresholds, calibration: Calibration
) -> RunReport:
    """Judge scores (K,) by the thresholds and the calibration of a run."""
    rates = error_rates(scores, trials.target)
    at = int(np.searchsorted(rates.threshold, thresholds.eer))
    at = min(at, len(rates.threshold) - 1)
    llrs = calibration.scale * scores + calibration.offset
    miss, alarm = float(rates.miss[at]), float(rates.alarm[at])
    return RunReport(thresholds.eer, miss, alarm, cllr(llrs, trials.target))


@dataclass(frozen=True)
class ModelScore:
    """What a model reaches alone; None where there is nothing to say."""

    checkpoint: str
    step: int
    backend: str
    """What named the speakers, head or wccn."""
    accuracy: float | None
    top5_accuracy: float | None
    eer: float | None
    """Of the trials, by scores of the same kind as those of all models together."""
    min_dcf: float | None
    tta_frames: int | None

    def line(self) -> str:
        """The same for people."""
        found = []
        if self.accuracy is not None:
            found.append(f"top-1 accuracy {self.accuracy:.4f}")
        if self.eer is not None:
            found += [f"EER {100 * self.eer:.2f} %", f"minDCF {self.min_dcf:.4f}"]
        return f"alone, {self.checkpoint}: {', '.join(found)}"


@dataclass(frozen=True)
class Plain:
    """What the cosines of trials say before they are normalised."""

    eer: float
    min_dcf: float

    def line(self) -> str:
        """The same for people."""
        return f"without AS-norm: EER {100 * self.eer:.2f} %, minDCF {self.min_dcf:.4f}"


@dataclass(frozen=True)
class Score:
    """What the command prints; None where there is nothing to say."""

    checkpoint: str | None
    """None of several models; `models` has those."""
    step: int | None
    shards: str
    split: str
    utterances: int
    labelled: int
    """Utterances whose speaker is known to us, and counted in the accuracies."""
    unknown_to_model: int
    """Those of them whose speaker the backend does not know: always wrong."""
    backend: str
    """What named the speakers, head or wccn; of several models maybe both."""
    accuracy: float | None
    top5_accuracy: float | None
    cohort: int | None
    """Speakers in the AS-norm cohort; None without AS-norm."""
    cohort_size: int | None
    """How many of them count for each side of a trial."""
    tta: int
    tta_frames: int | None
    """None also where the models differ in it."""
    verification: TrialReport
    """Of the trials."""
    plain: Plain | None
    """Of the same trials; None without AS-norm."""
    as_chosen: RunReport | None
    """Of the same trials, by what the run chose; None where it chose nothing for such scores."""
    models: tuple[ModelScore, ...]
    """What each model reaches alone."""
    combination: Combination | None
    """How several models named the speakers."""

    def to_json(self) -> str:
        """One JSON object, the report of the trials among its fields."""
        fields = msgspec.to_builtins(self)
        return json.dumps({**fields, **fields.pop("verification")})

    def lines(self) -> list[str]:
        """The same for people."""
        lines = []
        for name, share in (("top-1", self.accuracy), ("top-5", self.top5_accuracy)):
            if share is not None:
                right = f"{round(share * self.labelled):,} of {self.labelled:,}"
                lines.append(f"{name} accuracy on {self.split}: {share:.4f} ({right})")
        if self.accuracy is not None:
            lines.append(f"backend: {self.backend}")
        if verified := self.verification.lines():
            cohort = "none"
            if self.cohort is not None:
                cohort = f"the nearest {self.cohort_size:,} of {self.cohort:,} training speakers"
            lines += [*verified, f"cohort: {cohort}"]
        if self.plain is not None:
            lines.append(self.plain.line())
        if self.as_chosen is not None:
            lines.append(self.as_chosen.line())
        if len(self.models) > 1 and lines:
            lines += [model.line() for model in self.models]
        return lines
