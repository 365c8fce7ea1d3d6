"""The score of a run, against each utterance embedded alone and a loop over thresholds."""

from __future__ import annotations

import csv
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from oracle import model_of
from saved_models import BEST, change_best

import shardprep
from shardprep_trainer.checkpoint.files import load
from shardprep_trainer.config.scoring import Calibration, Thresholds
from shardprep_trainer.evaluation.trials import Trials, draw_trials
from shardprep_trainer.evaluation.wccn import Wccn
from shardprep_trainer.pretrained.on_shards import Inference
from shardprep_trainer.score import main

# As the fixture `run` has them.
NAMES = ["id00002", "id00000", "id00001"]


def score(run: Path, *options: object) -> Result:
    return CliRunner().invoke(main, [str(run), *map(str, options)])


def score_json(run: Path, *options: object) -> dict[str, Any]:
    result = score(run, "--json", *options)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def alone(run: Path, part: shardprep.Split) -> tuple[np.ndarray, list[str]]:
    """The oracle: unit embeddings (N, D) in float64 and predicted names, one by one."""
    names, model = load(run / BEST).speakers, model_of(run / BEST)
    rows, answers = [], []
    with torch.no_grad():
        for index in range(len(part)):
            mel = torch.from_numpy(part.read(index)).float()[None]
            rows.append(model.embed(mel)[0].double().numpy())
            answers.append(names[int(model(mel).argmax())])
    return np.array([row / np.linalg.norm(row) for row in rows]), answers


def naive(scores: list[float], target: list[bool]) -> tuple[float, float]:
    """EER and minDCF(.01) by a loop over the thresholds."""
    same = [s for s, kind in zip(scores, target, strict=True) if kind]
    others = [s for s, kind in zip(scores, target, strict=True) if not kind]
    points = [
        (sum(s < t for s in same) / len(same), sum(s >= t for s in others) / len(others))
        for t in [*sorted(scores), float("inf")]
    ]
    cost = min(0.01 * miss + 0.99 * alarm for miss, alarm in points) / 0.01
    for (miss, alarm), (then, there) in zip(points, points[1:], strict=False):
        if then >= there:
            share = (alarm - miss) / (alarm - miss + then - there)
            return miss + share * (then - miss), cost
    raise AssertionError


def speakers_of(shards: Path, split: str) -> list[str]:
    data = shardprep.open_shards(shards)
    return [data.speakers[label] for label in data[split].labels]


def write_trials(path: Path, keys: Any, pairs: list[tuple[int, int]], kinds: list[bool]) -> Path:
    rows = zip(kinds, pairs, strict=True)
    path.write_text("".join(f"{int(kind)} {keys[a]} {keys[b]}.pt\n" for kind, (a, b) in rows))
    return path


def some_kinds(count: int) -> list[bool]:
    """Answers that have nothing to do with the voices, so that there are errors to count."""
    return (np.random.default_rng(0).random(count) < 0.4).tolist()


def test_all_pairs_of_a_split_give_what_a_loop_gives(
    run: Path, shards: Path, tmp_path: Path
) -> None:
    part, truth = shardprep.open_shards(shards)["train"], speakers_of(shards, "train")
    unit, answers = alone(run, part)
    pairs = list(combinations(range(24), 2))
    kinds = some_kinds(len(pairs))
    trials = write_trials(tmp_path / "trials.txt", part.keys, pairs, kinds)
    found = score_json(run, "--split", "train", "--trials", trials, "--max-frames", 500)
    eer, dcf = naive([float(unit[a] @ unit[b]) for a, b in pairs], kinds)
    assert 0.2 < eer < 0.8
    # Scores that float32 cannot tell apart may change places.
    assert found["eer"] == pytest.approx(eer, abs=0.02)
    assert found["min_dcf"] == pytest.approx(dcf, abs=0.02)
    assert (found["trials"], found["target_trials"]) == (276, sum(kinds))
    assert found["trials_from"] == str(trials)
    right = sum(a == b for a, b in zip(answers, truth, strict=True))
    assert found["accuracy"] == right / 24
    assert found["top5_accuracy"] == 1
    assert (found["labelled"], found["unknown_to_model"], found["cohort"]) == (24, 0, None)


def test_drawn_trials_are_those_of_the_true_speakers(run: Path, shards: Path) -> None:
    unit = alone(run, shardprep.open_shards(shards)["val"])[0]
    truth = speakers_of(shards, "val")
    pairs = list(combinations(range(6), 2))
    kinds = [truth[a] == truth[b] for a, b in pairs]
    # All 3 target pairs there are, and 3 of the 12 others.
    found = score_json(run)
    assert (found["trials"], found["target_trials"]) == (6, 3)
    separable = min(unit[a] @ unit[b] for (a, b), kind in zip(pairs, kinds, strict=True) if kind)
    others = max(unit[a] @ unit[b] for (a, b), kind in zip(pairs, kinds, strict=True) if not kind)
    assert separable > others
    assert (found["eer"], found["min_dcf"]) == (0, 0)


def test_text_says_the_same_as_json(run: Path) -> None:
    found, result = score_json(run, "--as-norm", "--tta", 2), score(run, "--as-norm", "--tta", 2)
    right = round(found["accuracy"] * 6)
    assert result.stdout.splitlines() == [
        f"top-1 accuracy on val: {found['accuracy']:.4f} ({right} of 6)",
        "top-5 accuracy on val: 1.0000 (6 of 6)",
        "backend: head",
        f"EER: {100 * found['eer']:.2f} % (threshold {found['eer_threshold']:.4f})",
        f"minDCF(0.01): {found['min_dcf']:.4f} (threshold {found['min_dcf_threshold']:.4f})",
        "trials: 6 (3 of one speaker; drawn with seed 0)",
        "cohort: the nearest 3 of 3 training speakers",
        f"without AS-norm: EER {100 * found['plain']['eer']:.2f} %, "
        f"minDCF {found['plain']['min_dcf']:.4f}",
    ]
    assert (found["tta"], found["tta_frames"], found["cohort_size"]) == (2, 64, 3)


@pytest.mark.parametrize("speakers", [[], ["one"]])
def test_as_norm_without_two_training_speakers_is_refused_before_anything_is_embedded(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speakers: list[str]
) -> None:
    monkeypatch.setattr(Inference, "batches", None)
    with shardprep.ShardWriter(tmp_path / "few", 40, workers=1) as writer:
        mel = np.zeros((20, 40), np.float32)
        for name in speakers:
            writer.add(f"train-{name}", mel, name, "train")
        for number in range(4):
            writer.add(f"val-{number}", mel, f"id0000{number % 2}", "val")
    result = score(run, "--as-norm", "--shards", tmp_path / "few")
    assert result.exit_code == 1
    assert f"two training speakers or more, found {len(speakers)}; leave out" in result.stderr


def test_trials_are_drawn_by_the_seed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The scores of so few speakers come out alike for many draws, so the draws are compared.
    drawn: list[Trials] = []

    def spy(*arguments: Any) -> Trials:
        drawn.append(draw_trials(*arguments))
        return drawn[-1]

    monkeypatch.setattr("shardprep_trainer.score.draw_trials", spy)
    options = ("--split", "train", "--pairs", 31)
    first, again, _ = (score_json(run, *options, "--seed", seed) for seed in (4, 4, 5))
    assert first == again
    assert (first["trials"], first["target_trials"]) == (31, 15)
    assert first["trials_from"] == "drawn with seed 4"
    pairs = [set(zip(t.enroll.tolist(), t.test.tolist(), strict=True)) for t in drawn]
    assert pairs[0] == pairs[1] != pairs[2]


def test_no_segments_are_the_plain_score_and_no_pairs_no_verification(run: Path) -> None:
    assert score_json(run, "--tta", 0, "--tta-frames", 30) == score_json(run)
    bare = score_json(run, "--pairs", 0)
    assert (bare["trials"], bare["eer"], bare["min_dcf"]) == (0, None, None)
    assert "EER" not in score(run, "--pairs", 0).stdout


def test_a_split_without_pairs_has_no_verification_and_says_so(run: Path) -> None:
    result = score(run, "--split", "test", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["eer"] is None
    assert "note: test has no pairs of one speaker and of two" in result.stderr


def test_labels_tell_the_truth_of_the_test_split(run: Path, shards: Path, tmp_path: Path) -> None:
    truth = tmp_path / "test_labels.csv"
    rows = dict(line.split(",") for line in truth.read_text().splitlines()[1:])
    part = shardprep.open_shards(shards)["test"]
    answers = alone(run, part)[1]
    right = sum(rows[f"{key}.pt"] == name for key, name in zip(part.keys, answers, strict=True))
    found = score_json(run, "--split", "test", "--labels", truth, "--pairs", 0)
    assert (found["accuracy"], found["labelled"]) == (right / 5, 5)
    # One row less is one utterance less, whose speaker takes part in nothing.
    lines = truth.read_text().splitlines()
    truth.write_text("\n".join(lines[:-1]) + "\n")
    result = score(run, "--split", "test", "--labels", truth, "--pairs", 0, "--json")
    assert json.loads(result.stdout)["labelled"] == 4
    assert "note: 1 utterances of test have no label" in result.stderr


def test_an_unlabelled_split_can_be_scored_by_a_list(
    run: Path, shards: Path, tmp_path: Path
) -> None:
    keys, trials = shardprep.open_shards(shards)["test"].keys, tmp_path / "trials.txt"
    trials.write_text(f"1 {keys[0]} {keys[1]}\n0 {keys[0]} {keys[2]}\n")
    found = score_json(run, "--split", "test", "--trials", trials)
    assert (found["accuracy"], found["top5_accuracy"], found["labelled"]) == (None, None, 0)
    assert found["eer"] in (0, 1)


def test_speakers_unknown_to_the_model_are_wrong_but_make_trials(run: Path, shards: Path) -> None:
    change_best(run, speakers=("id00002", "someone", "else"))
    truth = speakers_of(shards, "train")
    answers = alone(run, shardprep.open_shards(shards)["train"])[1]
    result = score(run, "--split", "train", "--json")
    found = json.loads(result.stdout)
    assert (found["labelled"], found["unknown_to_model"], found["trials"]) == (24, 16, 168)
    assert found["accuracy"] == sum(a == b for a, b in zip(answers, truth, strict=True)) / 24
    assert found["top5_accuracy"] == 8 / 24
    assert "note: 16 utterances of train are from speakers who cannot be named" in result.stderr


def test_more_speakers_in_the_shards_than_in_the_model(run: Path) -> None:
    weights = load(run / BEST).weights
    for name in [name for name in weights if name.startswith("classifier.")]:
        weights[name] = weights[name][:1]
    change_best(run, speakers=("id00001",), weights=weights)
    found = score_json(run, "--as-norm")
    assert (found["accuracy"], found["cohort"]) == (2 / 6, 3)


def enrolled_names(run: Path, shards: Path, split: str) -> list[str]:
    """The oracle: each utterance alone, compared with the means of the training speakers."""
    data = shardprep.open_shards(shards)
    backend = Wccn(alone(run, data["train"])[0], data["train"].labels)
    return [data.speakers[n] for n in backend.scores(alone(run, data[split])[0]).argmax(1)]


def test_a_backend_recognises_by_the_training_utterances(run: Path, shards: Path) -> None:
    names, truth = enrolled_names(run, shards, "val"), speakers_of(shards, "val")
    right = sum(a == b for a, b in zip(names, truth, strict=True)) / 6
    by_head, found = score_json(run, "--as-norm"), score_json(run, "--as-norm", "--backend", "wccn")
    assert (found["backend"], found["accuracy"]) == ("wccn", right)
    assert (by_head["backend"], by_head["accuracy"] != right) == ("head", True)
    # Trials compare embeddings, and do not depend on the backend.
    same = ("eer", "min_dcf", "trials", "cohort")
    assert [found[key] for key in same] == [by_head[key] for key in same]


def test_a_backend_is_asked_only_where_there_are_labels(
    run: Path, shards: Path, tmp_path: Path
) -> None:
    keys, trials = shardprep.open_shards(shards)["test"].keys, tmp_path / "trials.txt"
    trials.write_text(f"1 {keys[0]} {keys[1]}\n0 {keys[0]} {keys[2]}\n")
    alone = tmp_path / "alone"
    metadata = {"n_mels": 40, "speakers": {}}
    (tmp_path / "Dataset" / "metadata.json").write_text(json.dumps(metadata))
    shardprep.build_shards(tmp_path / "Dataset", alone, shardprep.BuildOptions(workers=1))
    options = ("--shards", alone, "--split", "test", "--backend", "wccn")
    assert score_json(run, *options, "--trials", trials)["trials"] == 2
    result = score(run, *options, "--labels", tmp_path / "test_labels.csv")
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"{alone} has no train split with speakers" in result.stderr


def test_those_a_backend_knows_them_by_are_no_test_of_it(run: Path) -> None:
    result = score(run, "--split", "train", "--backend", "wccn", "--tta", 1)
    assert "backend: wccn" in result.stdout
    assert "note: the accuracy on train says nothing" in result.stderr
    assert "says nothing" not in score(run, "--split", "train").stderr


def test_a_backend_knows_the_speakers_of_the_shards(run: Path) -> None:
    change_best(run, speakers=("some", "one", "else"))
    assert score_json(run)["unknown_to_model"] == 6
    assert score_json(run, "--backend", "wccn")["unknown_to_model"] == 0


def test_as_norm_uses_the_training_speakers(run: Path, shards: Path, tmp_path: Path) -> None:
    data = shardprep.open_shards(shards)
    train, keys = alone(run, data["train"])[0], data["train"].keys
    labels = data["train"].labels
    means = np.array([train[labels == speaker].mean(0) for speaker in range(3)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    pairs, scores = list(combinations(range(24), 2)), []
    for one, other in pairs:
        sides = [np.sort(means @ train[side])[-2:] for side in (one, other)]
        parts = [(train[one] @ train[other] - side.mean()) / side.std() for side in sides]
        scores.append(sum(parts) / 2)
    # Answers that are right of the normalised scores, and of these only.
    kinds = [bool(score > sorted(scores)[-40]) for score in scores]
    trials = write_trials(tmp_path / "trials.txt", keys, pairs, kinds)
    options = ("--split", "train", "--trials", trials)
    found = score_json(run, *options, "--as-norm", "--cohort-size", 2)
    assert found["eer"] < 0.02
    assert (found["cohort"], found["cohort_size"]) == (3, 2)
    plain = score_json(run, *options)
    assert plain["eer"] > 0.05
    assert found["plain"] == {key: plain[key] for key in ("eer", "min_dcf")}
    assert plain["plain"] is None


@pytest.mark.parametrize(
    ("options", "code", "part"),
    [
        (["--split", "dev"], 1, "has no split dev"),
        (["--split", "test", "--pairs", "4"], 1, "split test of"),
        (["--split", "test", "--pairs", "4"], 1, "0 labelled utterances make only 0; no speaker"),
        (["--split", "test", "--pairs", "4"], 1, "give --trials, or give --labels"),
        (["--pairs", "1000"], 1, "500 target pairs (one speaker) asked for"),
        (["--split", "test", "--scores", "x"], 1, "makes no trials to write to x; give --trials"),
        (["--pairs", "1"], 2, "at least 2"),
        (["--pairs", "4", "--trials", "x"], 2, "exclude each other"),
        (["--trials", "nowhere.txt"], 1, "nowhere.txt: cannot be read"),
        (["--labels", "nowhere.csv"], 1, "nowhere.csv: cannot be read"),
        (["--cohort-size", "1"], 2, "cohort-size"),
        (["--checkpoint", "nowhere.pt"], 1, "nowhere.pt: there is no such checkpoint"),
    ],
)
def test_what_cannot_be_done_has_one_message_and_its_code(
    run: Path, options: list[str], code: int, part: str
) -> None:
    result = score(run, *options)
    assert (result.exit_code, result.stdout) == (code, "")
    assert part in result.stderr
    assert "Traceback" not in result.stderr


def test_faulty_files_are_named(run: Path, shards: Path, tmp_path: Path) -> None:
    trials, labels = tmp_path / "trials.txt", tmp_path / "labels.csv"
    key = shardprep.open_shards(shards)["val"].keys[0]
    trials.write_text(f"1 {key} {key}\nyes {key} {key}\n")
    assert f"{trials}, line 2: found" in score(run, "--trials", trials).stderr
    labels.write_text("Id,Category\nstranger.pt,id00001\n")
    wrong = score(run, "--labels", labels).stderr
    assert f"1 of the 1 utterances in {labels} are missing, the first is stranger.pt" in wrong
    labels.write_text(f"Id,Category\n{key}.pt,id00001\n{key},id00001\n")
    assert f"{labels}: {key} occurs twice" in score(run, "--labels", labels).stderr


def rows_of(file: Path) -> list[list[str]]:
    return [line.split("\t") for line in file.read_text().splitlines()[1:]]


def test_every_trial_is_written_with_its_score(run: Path, shards: Path, tmp_path: Path) -> None:
    part, out = shardprep.open_shards(shards)["train"], tmp_path / "scores.tsv"
    unit = alone(run, part)[0]
    position = {key: at for at, key in enumerate(part.keys.tolist())}
    found = score_json(run, "--split", "train", "--pairs", 40, "--scores", out)
    rows, truth = rows_of(out), speakers_of(shards, "train")
    assert len(rows) == 40
    for enroll, test, cosine, target, llr in rows:
        a, b = position[enroll], position[test]
        assert float(cosine) == pytest.approx(unit[a] @ unit[b], abs=1e-5)
        assert target == str(int(truth[a] == truth[b]))
        assert llr == ""
    # The file says all that the command has said, also to itself.
    again = judged("--from-scores", out)
    same = ("eer", "min_dcf", "eer_threshold", "min_dcf_threshold", "min_cllr", "calibration")
    assert [again[key] for key in same] == [found[key] for key in same]
    assert (again["trials"], again["trials_from"]) == (40, str(out))
    result = score(run, "--split", "train", "--scores", out)
    assert (
        f"too few speakers to calibrate trials by those of others: no Cllr, and no llr in {out}"
        in (" ".join(result.stderr.split()))
    )


def test_names_of_a_list_are_written_as_the_list_has_them(
    run: Path, shards: Path, tmp_path: Path
) -> None:
    keys, out = shardprep.open_shards(shards)["val"].keys, tmp_path / "scores.tsv"
    trials = tmp_path / "trials.txt"
    trials.write_text(f"/d/{keys[0]}.wav {keys[1]} target\n{keys[0]} /d/{keys[2]}.pt nontarget\n")
    score_json(run, "--trials", trials, "--scores", out)
    assert [row[:2] for row in rows_of(out)] == [
        [f"/d/{keys[0]}.wav", keys[1]],
        [keys[0], f"/d/{keys[2]}.pt"],
    ]


def judged(*options: object) -> dict[str, Any]:
    result = CliRunner().invoke(main, ["--json", *map(str, options)])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def foreign_scores(path: Path, *, labels: bool) -> tuple[list[float], list[bool]]:
    """Scores of another toolkit: 12 speakers of 3 utterances, every pair."""
    rng = np.random.default_rng(0)
    pairs = list(combinations(range(36), 2))
    target = [a // 3 == b // 3 for a, b in pairs]
    scores = rng.normal([3.0 if same else 0.0 for same in target], 1.0).tolist()
    names = [f"id{n // 3}/rec/{n}.wav" for n in range(36)]
    with path.open("w") as file:
        for (a, b), value, same in zip(pairs, scores, target, strict=True):
            kind = (" target" if same else " nontarget") if labels else ""
            file.write(f"{names[a]} {names[b]} {value!r}{kind}\n")
    return scores, target


def test_scores_of_other_toolkits_are_judged_without_a_model(tmp_path: Path) -> None:
    path, out = tmp_path / "scores.txt", tmp_path / "out.tsv"
    scores, target = foreign_scores(path, labels=True)
    found = judged("--from-scores", path, "--scores", out)
    eer, dcf = naive(scores, target)
    assert (found["eer"], found["min_dcf"]) == (pytest.approx(eer), pytest.approx(dcf))
    assert (found["trials"], found["target_trials"]) == (630, 36)
    # The ratios of the file have the cost that is told.
    llrs = [float(row[4]) for row in rows_of(out)]
    costs = {
        kind: np.mean([np.log2(1 + np.exp(-x if kind else x)) for x in own])
        for kind in (True, False)
        if (own := [x for x, same in zip(llrs, target, strict=True) if same is kind])
    }
    assert found["cllr"] == pytest.approx((costs[True] + costs[False]) / 2)
    assert found["min_cllr"] < found["cllr"] < 0.6
    assert found["calibration"]["scale"] > 1
    text = CliRunner().invoke(main, ["--from-scores", str(path)]).stdout.splitlines()
    assert text == [
        f"EER: {100 * found['eer']:.2f} % (threshold {found['eer_threshold']:.4f})",
        f"minDCF(0.01): {found['min_dcf']:.4f} (threshold {found['min_dcf_threshold']:.4f})",
        f"Cllr: {found['cllr']:.4f}, minCllr: {found['min_cllr']:.4f} "
        "(each trial calibrated by trials of other speakers, 5 parts)",
        f"trials: 630 (36 of one speaker; {path})",
    ]


def test_a_list_labels_the_scores_of_other_toolkits(tmp_path: Path) -> None:
    path, trials = tmp_path / "scores.txt", tmp_path / "trials.txt"
    foreign_scores(path, labels=False)
    trials.write_text("1 rec/0 rec/1\n0 rec/7 rec/0\n0 rec/5 rec/2\n")
    found = judged("--from-scores", path, "--trials", trials)
    assert (found["trials"], found["target_trials"]) == (3, 1)
    assert found["trials_from"] == str(trials)


def test_what_the_run_chose_is_tried_on_these_trials(run: Path, shards: Path) -> None:
    assert score_json(run)["as_chosen"] is None
    data = shardprep.open_shards(shards)
    unit, truth = alone(run, data["train"])[0], speakers_of(shards, "train")
    pairs = list(combinations(range(24), 2))
    cosines = np.array([unit[a] @ unit[b] for a, b in pairs])
    same = np.array([truth[a] == truth[b] for a, b in pairs])
    # Halfway between two scores, so that rounding moves none of them over it.
    ranked = np.sort(cosines[same])
    gap = int(np.diff(ranked[:60]).argmax())
    threshold = float(ranked[gap] + ranked[gap + 1]) / 2
    thresholds, calibration = Thresholds(threshold, 2.0), Calibration(4.0, -3.0)
    change_best(run, thresholds=thresholds, calibration=calibration)
    chosen = score_json(run, "--split", "train")["as_chosen"]
    assert chosen["threshold"] == threshold
    assert chosen["miss"] == pytest.approx((cosines[same] < threshold).mean())
    ratio = np.where(same, -1, 1) * (4 * cosines - 3)
    cost = np.log2(1 + np.exp(ratio))
    # All 84 pairs of one speaker, and as many of the 192 others as were drawn.
    assert chosen["cllr"] == pytest.approx((cost[same].mean() + cost[~same].mean()) / 2, abs=0.1)
    assert "as the run chose by its validation: threshold" in score(run).stdout
    # Other scores have other thresholds.
    assert score_json(run, "--as-norm")["as_chosen"] is None
    assert score_json(run, "--tta", 1)["as_chosen"] is None


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ([], "give a RUN, or --from-scores FILE"),
        (["RUN", "--from-scores", "x"], "leave out RUN"),
        (["--from-scores", "x", "--as-norm"], "leave out --as-norm"),
        (["--from-scores", "x", "--pairs", "7"], "leave out --pairs"),
        (["RUN", "--pairs", "0", "--scores", "x"], "no trials to write"),
    ],
)
def test_a_model_or_scores_are_judged(options: list[str], part: str) -> None:
    result = CliRunner().invoke(main, options)
    assert result.exit_code == 2
    assert part in result.stderr


def test_help_tells_the_exit_codes(run: Path) -> None:
    assert "Exit codes: 0 done, 1 failed, 2 usage" in " ".join(score(run, "-h").output.split())


def suspects_of(run: Path, out: Path, *options: object) -> tuple[dict[str, Any], list[list[str]]]:
    found = score_json(run, "--suspects", out, *options)
    with out.open(newline="") as file:
        return found, list(csv.reader(file))


def test_a_wrong_label_is_listed_first_with_the_speaker_it_sounds_like(
    run: Path, shards: Path, tmp_path: Path
) -> None:
    part, truth = shardprep.open_shards(shards)["train"], speakers_of(shards, "train")
    given = dict(zip(part.keys, truth, strict=True))
    wrong = part.keys[7]
    given[wrong] = next(name for name in NAMES if name != truth[7])
    labels = tmp_path / "labels.csv"
    labels.write_text("Id,Category\n" + "".join(f"{k}.pt,{name}\n" for k, name in given.items()))
    found, rows = suspects_of(run, tmp_path / "out.csv", "--labels", labels)
    assert rows[0] == ["key", "speaker", "nearest", "own", "other", "margin", "verdict"]
    assert rows[1][:3] == [wrong, given[wrong], truth[7]]
    assert rows[1][6] == "wrong speaker"
    own, other, margin = map(float, rows[1][3:6])
    assert margin == pytest.approx(own - other, abs=1e-4)
    margins = [float(row[5]) for row in rows[1:]]
    assert margins == sorted(margins)
    assert margins[-1] < 0
    assert found["suspects"] == len(rows) - 1 == found["wrong_speaker"] + found["nobody"]
    counts = [found[key] for key in ("split", "utterances", "labelled", "judged")]
    assert counts == ["train", 24, 24, 24]
    # Nothing else is computed: the split itself has the true labels.
    assert len(suspects_of(run, tmp_path / "out.csv")[1]) < len(rows)


def test_suspects_that_cannot_be_judged_are_counted(
    run: Path, shards: Path, tmp_path: Path
) -> None:
    keys, out = shardprep.open_shards(shards)["val"].keys, tmp_path / "out.csv"
    labels = tmp_path / "labels.csv"
    labels.write_text(f"Id,Category\n{keys[0]},a\n{keys[1]},a\n{keys[2]},b\n")
    options = ("--split", "val", "--labels", labels, "--suspects", out)
    result = score(run, *options)
    assert result.exit_code == 0, result.output
    assert "note: 1 utterances of val are the only ones of their speaker" in result.stderr
    assert "note: 3 utterances of val have no label" in result.stderr
    assert f"of 2 utterances are nearer to another speaker -> {out}" in result.stdout
    labels.write_text(f"Id,Category\n{keys[0]},a\n{keys[1]},a\n")
    result = score(run, *options)
    assert result.exit_code == 1
    assert "split val: 1 speakers, of whom none has more than 2 utterances" in result.stderr


@pytest.mark.parametrize("option", ["--trials=x", "--backend=head", "--as-norm", "--seed=0"])
def test_what_judges_the_model_is_refused_beside_suspects(
    run: Path, tmp_path: Path, option: str
) -> None:
    result = score(run, "--suspects", tmp_path / "out.csv", option)
    assert result.exit_code == 2
    assert f"leave out {option.partition('=')[0]}, or --suspects" in result.stderr
    assert not (tmp_path / "out.csv").exists()
