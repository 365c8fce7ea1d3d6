"""Files of scores: ours read back, those of other toolkits, and by a list of trials."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shardprep_trainer.errors import PredictionError
from shardprep_trainer.evaluation.score_files import read_scores, write_scores
from shardprep_trainer.evaluation.trial_lists import read_list

SCORES = np.array([0.1 + 0.2, -1e-17, 12345.678, 1 / 3])
TARGET = np.array([True, False, True, False])
SIDES = (["a", "a", "s/b", "c"], ["s/b", "c", "c", "d"])


def test_ours_is_read_back_to_the_bit(tmp_path: Path) -> None:
    for llrs in (SCORES * 3, None):
        write_scores(tmp_path / "s.tsv", SIDES, SCORES, TARGET, llrs)
        found = read_scores(tmp_path / "s.tsv")
        assert found.scores.tolist() == SCORES.tolist()
        assert found.target is not None
        assert found.target.tolist() == TARGET.tolist()
        assert found.sides == SIDES
    lines = (tmp_path / "s.tsv").read_text().splitlines()
    assert lines[:2] == ["enroll\ttest\tscore\ttarget\tllr", "a\ts/b\t0.30000000000000004\t1\t"]


@pytest.mark.parametrize(
    "rows",
    [
        ["a b 0.5 target", "a c -0.5 nontarget"],
        ["a b 0.5 1", "a c -0.5 0"],
        ["1 0.5 a b", "0 -0.5 a c"],
        ["a b 1 5e-1", "a c 0 -.5"],
        ["a,b,0.5,1", "a,c,-0.5,0"],
        ['"enroll","test","score","target"', '"a","b",0.5,1', '"a","c",-0.5,0'],
        ["label\tscore\tenroll\ttest", "1\t0.5\ta\tb", "0\t-0.5\ta\tc"],
    ],
)
def test_columns_are_known_by_what_they_hold(rows: list[str], tmp_path: Path) -> None:
    path = tmp_path / "scores.txt"
    path.write_text("\n".join(rows) + "\n\n")
    found = read_scores(path)
    assert found.scores.tolist() == [0.5, -0.5]
    assert found.target is not None
    assert found.target.tolist() == [True, False]
    assert found.sides == (["a", "a"], ["b", "c"])
    scores, trials = found.labelled()
    assert scores.tolist() == [0.5, -0.5]
    assert (trials.enroll[0] == trials.enroll[1], trials.test[0] == trials.test[1]) == (True, False)


def test_a_header_may_call_the_names_what_it_likes(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    path.write_text("utt1,utt2,Score,label\na,b,0.5,1\na,c,-0.5,0\n")
    assert read_scores(path).sides == (["a", "a"], ["b", "c"])


def test_without_names_every_trial_is_of_others(tmp_path: Path) -> None:
    path = tmp_path / "scores.txt"
    path.write_text("0.5 1\n0.1 0\n0.7 1\n")
    trials = read_scores(path).labelled()[1]
    assert len({*trials.enroll, *trials.test}) == 6


def test_a_list_says_which_scores_count_in_which_order(tmp_path: Path) -> None:
    path, trials = tmp_path / "scores.txt", tmp_path / "trials.txt"
    path.write_text("d/a.wav d/b.wav .5\nd/c.wav d/a.wav .25\nd/b.wav d/c.wav .75\n")
    trials.write_text("1 b c\n0 a c\n")
    scores, found = read_scores(path).of(read_list(trials))
    assert scores.tolist() == [0.75, 0.25]
    assert found.target.tolist() == [True, False]
    assert found.test[0] == found.test[1]
    with pytest.raises(PredictionError, match="no column that says .* --trials"):
        read_scores(path).labelled()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("a b .5 1\na c .5\n", "line 2: 3 fields, but the first line has 4"),
        ("a b nan 1\na c .5 0\n", "line 1: the score is 'nan', expected a finite number"),
        ("enroll test score target\na b x 1\n", "line 2: the score is 'x'"),
        ("enroll test score target\na b 1 yes\n", "line 2: the label is 'yes', expected 1, 0"),
        ("a b c .5\n", r"columns are names, scores and labels cannot be told \(3, 1 and 0 "),
        ("7 8 .5 1\n7 9 .4 0\n", r"cannot be told \(0, 3 and 1 .*write a header above"),
        ("a b 1 1\na c 0 0\n", r"cannot be told \(2, 0 and 2 "),
        ("a b .5 1\na b .6 1\n", "line 2: a b has another score than in line 1"),
        ("a b .5 1\n", r"trials\.txt, line 2: .*scores\.txt has no score of a c; score all"),
        ("enroll test score score\na b .5 .6\n", "names the column 'score' twice; leave one"),
        (".5 1\n.4 0\n", "has no names of utterances, by which --trials"),
        ("x/c d .5\ny/c d .5\na b .1\n", "line 2: c stands for several utterances"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, message: str, tmp_path: Path) -> None:
    path, trials = tmp_path / "scores.txt", tmp_path / "trials.txt"
    path.write_text(text)
    trials.write_text("1 a b\n0 a c\n")
    with pytest.raises(PredictionError, match=message):
        read_scores(path).of(read_list(trials))


@pytest.mark.parametrize(
    ("text", "kinds"), [("a b .5 1\n", "1 target and 0 non"), ("a b .5 0\n", "0 target and 1")]
)
def test_one_kind_of_trials_is_too_few(text: str, kinds: str, tmp_path: Path) -> None:
    (tmp_path / "s").write_text(text)
    with pytest.raises(PredictionError, match=kinds):
        read_scores(tmp_path / "s").labelled()
