"""Measure how good a model is: `shardprep score RUN`.

Accuracy asks which of the known speakers an utterance is from; speaker verification asks whether
two utterances have one speaker, known to the model or not. Axis legend: N utterances, K trials.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import msgspec

from shardprep import Split
from shardprep_trainer.commands import (
    EXIT_CODES,
    backend_option,
    given,
    model_options,
    note,
    reported_errors,
    tell,
)
from shardprep_trainer.errors import PredictionError
from shardprep_trainer.evaluation.labels import number_speakers
from shardprep_trainer.evaluation.names import Names
from shardprep_trainer.evaluation.report import (
    ModelScore,
    Plain,
    RunReport,
    Score,
    TrialReport,
    report_file,
    report_run,
    report_trials,
)
from shardprep_trainer.evaluation.suspects.listing import list_suspects
from shardprep_trainer.evaluation.trial_lists import read_list
from shardprep_trainer.evaluation.trials import Ints, Trials, draw_trials, possible_trials
from shardprep_trainer.evaluation.verification import (
    Floats,
    Verified,
    as_norm,
    cosine_scores,
    judge,
)
from shardprep_trainer.inference import ModelOptions, open_inference
from shardprep_trainer.pretrained.on_shards import Found, Inference
from shardprep_trainer.pretrained.true_names import true_names

# Trials drawn of each kind where no number is given, and where there are so many.
_DRAWN = 50_000


@dataclass(frozen=True)
class TrialOptions:
    """Which trials are scored, and how."""

    file: Path | None
    """A list of trials; None draws them."""
    pairs: int | None
    """How many to draw; None for the default, 0 for none."""
    seed: int
    cohort_size: int | None
    """Nearest of the cohort that normalise a score; None leaves it as it is."""


@dataclass(frozen=True)
class Chosen:
    """The trials that are scored."""

    trials: Trials
    sides: tuple[Sequence[str], Sequence[str]]
    """Names of their utterances, as a list has them, or keys."""
    source: str
    """The list, or the seed that drew them."""


def choose_trials(
    options: TrialOptions, inference: Inference, part: Split, speakers: Ints
) -> Chosen | None:
    """The trials to score, or None where none are wanted, or none can be drawn unasked.

    Args:
        options: Which.
        inference: What is scored.
        part: The split.
        speakers: A number of the speaker of each utterance (N,), -1 where unknown.

    Raises:
        PredictionError: The list is faulty, or there are not as many pairs as are to be drawn.
    """
    if options.file is not None:
        wanted = read_list(options.file)
        trials = wanted.positions(Names(part.keys), inference.left_out)
        return Chosen(trials, (wanted.enroll, wanted.test), str(options.file))
    if options.pairs == 0:
        return None
    targets = nontargets = min(_DRAWN, *possible_trials(speakers))
    if options.pairs is not None:
        targets, nontargets = options.pairs // 2, options.pairs - options.pairs // 2
    elif not targets:
        note(f"{part.name} has no pairs of one speaker and of two; no EER and no minDCF")
        return None
    try:
        trials = draw_trials(speakers, targets, nontargets, options.seed)
    except ValueError as error:
        raise PredictionError(
            f"split {part.name} of {inference.shards.where}: {error}; take fewer --pairs (0 for "
            "none), give --trials, or give --labels if the split has none"
        ) from error
    sides = (part.keys[trials.enroll].tolist(), part.keys[trials.test].tolist())
    return Chosen(trials, sides, f"drawn with seed {options.seed}")


def score(
    inference: Inference,
    part: Split,
    names: Sequence[str | None],
    options: TrialOptions,
    out: Path | None = None,
) -> Score:
    """Embed a split, and measure accuracy and speaker verification.

    Args:
        inference: The models and the shards.
        part: The split.
        names: Its speakers (N,), None where unknown.
        options: The trials.
        out: Where every trial is written with its score.

    Raises:
        PredictionError: See `choose_trials`, `Inference.cohorts` and `Inference.recognise`; or
            there are no trials to write.
    """
    # Trials first: what is wrong with them is said before the long work.
    speakers = number_speakers(names)
    chosen = choose_trials(options, inference, part, speakers)
    if chosen is None and out is not None:
        raise PredictionError(
            f"split {part.name} of {inference.shards.where} makes no trials to write to {out}; "
            "give --trials, another --split, or leave out --scores"
        )
    labelled = sum(name is not None for name in names)
    # Without labels a backend need not learn to know anybody.
    strangers = _strangers(inference, part, names) if labelled else 0
    if labelled < len(part):
        note(f"{len(part) - labelled:,} utterances of {part.name} have no label")
    size = options.cohort_size
    cohorts = None if chosen is None or size is None else inference.cohorts
    found = inference.recognise(part, names) if labelled else inference.embed(part)
    verification, plain, as_chosen = TrialReport(), None, None
    alone: list[Verified | None] = [None] * len(inference.models)
    if chosen is not None:
        trials = chosen.trials
        each = [cosine_scores(own, trials) for own in found.ways]
        if cohorts is not None:
            before = judge(each[-1], trials.target)
            plain = Plain(before.eer, before.min_dcf)
            ways = zip(each, found.ways, cohorts, strict=True)
            each = [as_norm(own, by, trials, cohort, size or 0) for own, by, cohort in ways]
        else:
            as_chosen = _as_chosen(inference, each[-1], trials)
        alone = [judge(own, trials.target) for own in each[: len(alone)]]
        verification = report_trials(each[-1], trials, chosen.source, speakers, chosen.sides, out)
        _tell_of(verification, out)
    evaluation, one = found.evaluation, len(inference.models) == 1
    frames = inference.tta_frames
    return Score(
        checkpoint=str(inference.models[0].file) if one else None,
        step=inference.models[0].step if one else None,
        shards=inference.shards.where,
        split=part.name,
        utterances=len(part),
        labelled=labelled,
        unknown_to_model=strangers,
        backend=" and ".join(sorted({model.backend for model in inference.models})),
        accuracy=evaluation.correct / labelled if evaluation else None,
        top5_accuracy=evaluation.correct_top5 / labelled if evaluation else None,
        cohort=None if cohorts is None else len(cohorts[0]),
        cohort_size=None if cohorts is None else min(len(cohorts[0]), size or 0),
        tta=inference.tta,
        tta_frames=frames[0] if inference.tta and len(set(frames)) == 1 else None,
        verification=verification,
        plain=plain,
        as_chosen=as_chosen,
        models=_alone(inference, found, labelled, alone),
        combination=found.combination,
    )


def _strangers(inference: Inference, part: Split, names: Sequence[str | None]) -> int:
    """How many utterances are from speakers who cannot be named; tells of them."""
    if not inference.agree:
        note(
            "the models know different speakers: each has an accuracy of its own, but all together "
            "have none; --backend wccn knows the speakers of the shards"
        )
    known = set.intersection(*(set(each) for each in inference.known.values()))
    strangers = sum(name is not None and name not in known for name in names)
    if strangers:
        note(
            f"{strangers:,} utterances of {part.name} are from speakers who cannot be named: "
            "wrong for the accuracy, but good for trials"
        )
    return strangers


def _as_chosen(inference: Inference, scores: Floats, trials: Trials) -> RunReport | None:
    """What the thresholds of a run do to plain cosines; those of several models have none."""
    model, *others = inference.models
    if others or not model.thresholds or not model.calibration or inference.tta:
        return None
    return report_run(scores, trials, model.thresholds, model.calibration)


def _alone(
    inference: Inference, found: Found, labelled: int, verified: Sequence[Verified | None]
) -> tuple[ModelScore, ...]:
    """What each model reaches alone."""
    evaluations = found.evaluations or (None,) * len(inference.models)
    return tuple(
        ModelScore(
            checkpoint=str(model.file),
            step=model.step,
            backend=model.backend,
            accuracy=evaluation.correct / labelled if evaluation else None,
            top5_accuracy=evaluation.correct_top5 / labelled if evaluation else None,
            eer=trials.eer if trials else None,
            min_dcf=trials.min_dcf if trials else None,
            tta_frames=frames or None,
        )
        for model, evaluation, trials, frames in zip(
            inference.models, evaluations, verified, inference.tta_frames, strict=True
        )
    )


@click.command(
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
    help=f"""Measure the model of RUN on a split of whole utterances.

    RUN is a run folder, a model folder or a checkpoint; several models are measured together, and
    each alone. Prints top-1 and top-5 accuracy, and for trials, pairs of utterances scored by the
    cosine of their embeddings, the equal error rate, the normalised minimum detection cost and
    their thresholds, and the cost of calibrated scores (Cllr). With --from-scores, the scores come
    from a file, and there is no RUN. With --suspects, the labels are judged, not the models.
    Results go to stdout, all else to stderr.
    {EXIT_CODES}""",
)
@model_options(split="val", required=False)
@backend_option
@click.option(
    "--labels",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="CSV of true labels, Id,Category, for a split without them.",
)
@click.option(
    "--trials",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="List of trials: `1 ENROLL TEST` or `0 ENROLL TEST` a line (VoxCeleb), `ENROLL TEST "
    "target` or `nontarget` (Kaldi), or `ENROLL TEST 1` or `0`.",
)
@click.option(
    "--pairs",
    type=click.IntRange(min=0),
    default=None,
    help="Trials to draw, half of them of one speaker; 0 for none.  [default: up to "
    f"{2 * _DRAWN:,}]",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Decides the draw of trials.")
@click.option(
    "--as-norm",
    "normalized",
    is_flag=True,
    help="Normalise scores (AS-norm); plain ones are reported, too.",
)
@click.option(
    "--cohort-size",
    type=click.IntRange(min=2),
    default=300,
    help="Nearest training speakers that AS-norm compares each side of a trial with.",
)
@click.option(
    "--scores",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="File to write every trial to: enroll, test, score, target, llr.",
)
@click.option(
    "--from-scores",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="Judge the scores in this file, of any toolkit, instead of a RUN: a trial a line, with "
    "its label, or with --trials.",
)
@click.option(
    "--suspects",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="Only write this CSV: the utterances of the split (here train by default) that are nearer "
    "to another speaker than to the other utterances of their own, the most suspicious first.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    labels: Path | None,
    trials: Path | None,
    pairs: int | None,
    seed: int,
    normalized: bool,
    cohort_size: int,
    scores: Path | None,
    from_scores: Path | None,
    suspects: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """The command; its help is above."""
    context = click.get_current_context()
    if from_scores is not None:
        _refuse_beside_scores(context)
        with reported_errors():
            report = report_file(from_scores, trials, scores)
            _tell_of(report, scores)
        text = json.dumps(msgspec.to_builtins(report))
        click.echo(text if as_json else "\n".join(report.lines()))
        return
    if not options["runs"]:
        raise click.UsageError("give a RUN, or --from-scores FILE")
    if suspects is not None:
        _refuse_beside_suspects(context)
        if "split" not in given(context):
            options["split"] = "train"
        # Naming speakers takes no part, whatever the recipe says.
        options["backend"] = "head"
        with reported_errors():
            inference = open_inference(ModelOptions(**options), tell)
            part = inference.split(options["split"])
            names = true_names(inference, part, labels)
            listed = list_suspects(inference.embed(part).embeddings, part, names, suspects)
        for text in listed.notes:
            note(text)
        click.echo(json.dumps(asdict(listed)) if as_json else "\n".join(listed.lines()))
        return
    if trials is not None and pairs is not None:
        raise click.UsageError("--trials and --pairs exclude each other: give one of them")
    if pairs == 1:
        raise click.UsageError("--pairs 1: a target and a non-target trial make at least 2")
    if pairs == 0 and scores is not None:
        raise click.UsageError("--scores: with --pairs 0 there are no trials to write")
    wanted = TrialOptions(trials, pairs, seed, cohort_size if normalized else None)
    with reported_errors():
        inference = open_inference(ModelOptions(**options), tell)
        part = inference.split(options["split"])
        result = score(inference, part, true_names(inference, part, labels), wanted, scores)
    click.echo(result.to_json() if as_json else "\n".join(result.lines()))


def _tell_of(report: TrialReport, out: Path | None) -> None:
    if report.cllr is None:
        note(
            "too few speakers to calibrate trials by those of others: no Cllr"
            + (f", and no llr in {out}" if out else "")
        )
    if out is not None:
        tell(f"{report.trials:,} trials -> {out}")


def _refuse_beside_scores(context: click.Context) -> None:
    """Refuse what only a model can answer, beside --from-scores."""
    allowed = ("from_scores", "trials", "scores", "as_json")
    if others := [told for name, told in given(context).items() if name not in allowed]:
        raise click.UsageError(
            f"--from-scores takes the scores as they are: leave out {others[0]}, or --from-scores"
        )


def _refuse_beside_suspects(context: click.Context) -> None:
    """Refuse what judges the model, beside --suspects."""
    refused = ("backend", "trials", "pairs", "seed", "normalized", "cohort_size", "scores")
    if others := [told for name, told in given(context).items() if name in refused]:
        raise click.UsageError(
            f"--suspects judges the labels only: leave out {others[0]}, or --suspects"
        )


if __name__ == "__main__":
    main()
