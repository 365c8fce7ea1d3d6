"""Validation: speakers whom train lacks are in no head, make the trials, and choose the best."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from new_speakers import write_set
from oracle import model_of
from saved_models import BEST

import shardprep
from shardprep_trainer.checkpoint.files import load
from shardprep_trainer.checkpoint.state import Best
from shardprep_trainer.config.fields import Config, ModelConfig
from shardprep_trainer.errors import ConfigError
from shardprep_trainer.evaluation.accuracy import Evaluation
from shardprep_trainer.evaluation.calibration import fit_calibration
from shardprep_trainer.evaluation.verification import equal_error_rate, judge
from shardprep_trainer.model.build import build_model
from shardprep_trainer.run.data import build_train_loader
from shardprep_trainer.run.speakers import speakers_of
from shardprep_trainer.run.start import prepare
from shardprep_trainer.run.trainer import Trainer
from shardprep_trainer.run.validation import Validated, Validation, plan_validation

ConfigFactory = Callable[..., Config]
CPU = torch.device("cpu")


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A set whose split val has speakers of train, and others."""
    return write_set(tmp_path / "mixed")


def fit(config: Config, *, resume: bool = False) -> Trainer:
    trainer = Trainer(prepare(config, resume=resume))
    trainer.fit()
    trainer.close()
    return trainer


def validations(config: Config) -> list[dict[str, Any]]:
    lines = (config.run / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{**row, "seconds": 0} for row in rows if row["event"] == "valid"]


def test_the_head_has_the_speakers_of_train_alone(mixed: Path, make_config: ConfigFactory) -> None:
    config, shards = make_config(**{"data.shards": mixed}), shardprep.open_shards(mixed)
    speakers = speakers_of(shards)
    assert speakers.names == ("a", "c", "e")
    assert speakers.of(np.array([4, 0, 1, 2, 3])).tolist() == [2, 0, -1, 1, -1]
    trainer = Trainer(prepare(config))
    raw = next(iter(build_train_loader(config, shards, 0, 1, CPU)))["label"]
    learned = next(trainer._batches())["label"]
    assert [speakers.names[label] for label in learned] == [shards.speakers[x] for x in raw]
    trainer.fit()
    trainer.close()
    saved = load(config.run / BEST)
    assert saved.speakers == ("a", "c", "e")
    assert len(saved.weights["classifier.weight"]) == 3


def test_trials_of_strangers_give_the_rate_that_each_embedded_alone_gives(
    mixed: Path, make_config: ConfigFactory
) -> None:
    config = make_config(**{"data.shards": mixed, "train.valid_steps": 12})
    trainer = fit(config)
    plan, part = trainer.validation, shardprep.open_shards(mixed)["val"]
    assert plan is not None
    assert plan.trials is not None
    assert plan.utterances is not None
    pairs = plan.utterances[np.stack((plan.trials.enroll, plan.trials.test))]
    names = np.array(shardprep.open_shards(mixed).speakers)[part.labels]
    new = [position for position, name in enumerate(names) if name in "bd"]
    alike = [pair for pair in combinations(new, 2) if names[pair[0]] == names[pair[1]]]
    # All pairs of one speaker that b and d make, and as many of the 12 others.
    assert sorted(map(tuple, pairs[:, :9].T.tolist())) == alike
    assert plan.trials.target.tolist() == [True] * 9 + [False] * 9
    assert {frozenset(names[pair]) for pair in pairs[:, 9:].T} == {frozenset("bd")}
    model, unit = model_of(config.run / BEST), []
    with torch.no_grad():
        for index in range(len(part)):
            row = model.embed(torch.from_numpy(part.read(index))[None])[0].double()
            unit.append(row / row.norm())
    scores = np.array([float(unit[a] @ unit[b]) for a, b in pairs.T])
    (row,) = validations(config)
    # Scores that float32 cannot tell apart may change places.
    assert row["eer"] == pytest.approx(equal_error_rate(scores, plan.trials.target), abs=0.06)
    assert row["trials"] == 18
    assert (row["utterances"], row["accuracy"]) == (4, row["correct"] / 4)
    best = load(config.run / BEST)
    assert best.best == Best(row["accuracy"], 12, row["eer"])
    # What a command decides by: the rates at the threshold are those of the validation.
    assert best.thresholds is not None
    accepted = scores >= best.thresholds.eer - 1e-6
    rates = (~accepted[:9]).mean(), accepted[9:].mean()
    assert min(rates) - 0.06 <= row["eer"] <= max(rates) + 0.06
    fitted = fit_calibration(scores, plan.trials.target)
    assert best.calibration is not None
    assert best.calibration.scale == pytest.approx(fitted.scale, rel=1e-3)
    assert best.calibration.offset == pytest.approx(fitted.offset, rel=1e-3)
    described = json.loads((config.run / "model" / "config.json").read_text())
    assert described["calibration"]["scale"] == best.calibration.scale


def test_without_trials_a_model_has_no_thresholds(mixed: Path, make_config: ConfigFactory) -> None:
    config = make_config(**{"data.shards": mixed, "train.valid_trials": 0})
    fit(config)
    best = load(config.run / BEST)
    assert (best.thresholds, best.calibration, best.best.eer) == (None, None, None)
    assert [row["eer"] for row in validations(config)] == [None, None]


def test_a_resumed_run_with_strangers_equals_an_uninterrupted_one(
    mixed: Path, make_config: ConfigFactory
) -> None:
    options = {"data.shards": mixed, "train.valid_steps": 3}
    whole, parts = (make_config(name=name, **options) for name in ("whole", "parts"))
    first = fit(whole)
    fit(make_config(name="parts", **options, **{"train.stop_step": 5}))
    second = fit(parts, resume=True)
    assert first.best == second.best
    assert first.best.eer is not None
    assert len(validations(whole)) == 4
    assert validations(parts) == validations(whole)
    one, other = (load(config.run / BEST) for config in (whole, parts))
    assert one.step == other.step
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)


def found(eer: float | None, correct: int, labelled: int = 10) -> Validated:
    verified = None
    if eer is not None:
        wrong = round(100 * eer)
        scores = np.concatenate((np.arange(100) >= wrong, np.arange(100) < wrong)).astype(float)
        verified = judge(scores, np.arange(200) < 100)
    return Validated(Evaluation(np.empty(0, int), correct, labelled, 0.0), None, None, verified)


@pytest.mark.parametrize(
    ("by_eer", "best", "now", "better"),
    [
        (False, Best(), found(None, 0), True),
        (False, Best(0.5, 3), found(None, 5), True),
        (False, Best(0.5, 3, 0.4), found(0.1, 4), False),
        (False, Best(), found(0.1, 0, 0), False),
        (True, Best(), found(0.4, 0), True),
        (True, Best(0.9, 3, 0.4), found(0.4, 1), True),
        (True, Best(0.1, 3, 0.4), found(0.41, 9), False),
        (True, Best(0.1, 3, 0.4), found(0.3, 0, 0), True),
        # A score was not a finite number.
        (True, Best(), found(None, 9), False),
        # The run before had no trials.
        (True, Best(0.9, 3), found(0.5, 1), True),
    ],
)
def test_the_measure_of_the_run_decides(
    by_eer: bool, best: Best, now: Validated, better: bool
) -> None:
    assert Validation(np.empty(0, int), None, None, 0, by_eer).is_better(now, best) is better


@pytest.mark.parametrize(
    ("counts", "wanted", "trials", "by_eer"),
    [
        # Nobody is new: trials of all, and accuracy decides.
        ({"a": (8, 3), "b": (8, 2)}, 100, 8, False),
        ({"a": (8, 3), "b": (8, 2)}, 5, 4, False),
        ({"a": (8, 3), "b": (8, 2)}, 1, 0, False),
        # One new speaker makes no pair of two: trials of all.
        ({"a": (8, 2), "b": (0, 2)}, 100, 4, False),
        ({"a": (8, 1), "b": (0, 2), "c": (0, 1)}, 100, 2, True),
        ({"a": (8, 0), "b": (0, 2), "c": (0, 2)}, 100, 4, True),
    ],
)
def test_trials_are_those_of_new_speakers_where_they_make_any(
    counts: dict[str, tuple[int, int]], wanted: int, trials: int, by_eer: bool, tmp_path: Path
) -> None:
    shards = shardprep.open_shards(write_set(tmp_path / "set", counts))
    plan = plan_validation(shards, speakers_of(shards), wanted)
    assert (0 if plan.trials is None else len(plan.trials), plan.by_eer) == (trials, by_eer)


@pytest.mark.parametrize(
    ("counts", "wanted"),
    [
        ({"a": (8, 0), "b": (0, 3)}, 100),
        ({"a": (8, 0), "b": (0, 1), "c": (0, 1)}, 100),
        ({"a": (8, 0), "b": (0, 2), "c": (0, 2)}, 1),
    ],
)
def test_a_run_that_could_not_choose_its_best_model_is_refused(
    counts: dict[str, tuple[int, int]], wanted: int, tmp_path: Path, make_config: ConfigFactory
) -> None:
    place = write_set(tmp_path / "set", counts)
    options = {"data.shards": place, "train.valid_trials": wanted, "name": str(wanted)}
    with pytest.raises(ConfigError, match=rf"train\.valid_trials: found {wanted}, but val of .*0$"):
        prepare(make_config(**options))
    prepare(make_config(**options, **{"train.valid_steps": 0}))


def test_a_damaged_utterance_leaves_its_trials_out(mixed: Path) -> None:
    shards = shardprep.open_shards(mixed)
    plan = plan_validation(shards, speakers_of(shards), 100)
    assert plan.trials is not None
    assert plan.utterances is not None
    torch.manual_seed(0)
    config = ModelConfig(dim=16, heads=2, head_dim=8, ff_dim=32, kernel_size=7)
    model = build_model(config, 40, 3)
    batches = list(shardprep.UtteranceLoader(shards["val"], max_frames=1))

    def measure(gone: int) -> Validated:
        return plan(
            model,
            [batch for batch in batches if int(batch["index"]) != gone],
            device=CPU,
            criterion=torch.nn.functional.cross_entropy,
            reduce=lambda total: total,
            incomplete=True,
        )

    gone = int(plan.utterances[plan.trials.test[0]])
    whole, part = measure(-1), measure(gone)
    touched = (plan.utterances[np.stack((plan.trials.enroll, plan.trials.test))] == gone).any(0)
    assert whole.scores is not None
    assert part.scores is not None
    assert np.array_equal(part.scores, whole.scores[~touched])
    assert part.verified is not None
    assert part.verified.trials == (~touched).sum()
