"""Lists of trials in every form, and by every name of an utterance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shardprep_trainer.errors import PredictionError
from shardprep_trainer.evaluation.labels import LeftOut
from shardprep_trainer.evaluation.trial_lists import read_list, read_trials


def test_a_list_may_name_the_audio_and_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "trials.txt"
    path.write_bytes(b"\xef\xbb\xbf1 s/a.wav s/b.flac\r\n0 s/a.m4a s/c\r\n")
    trials = read_trials(path, ["s/a", "s/b", "s/c"])
    assert trials.enroll.tolist() == [0, 0]
    assert trials.test.tolist() == [1, 2]


def test_a_key_of_several_utterances_is_refused_where_a_list_names_it(tmp_path: Path) -> None:
    path = tmp_path / "trials.txt"
    path.write_text("1 a b.pt\n0 a c\n")
    assert len(read_trials(path, ["a", "b", "c", "d", "d"])) == 2
    for keys in (["a", "b", "c", "b"], ["b", "b", "b", "a", "c"]):
        with pytest.raises(PredictionError, match="line 1: b.pt stands for several utterances"):
            read_trials(path, keys)


def test_a_list_is_read_by_either_name(tmp_path: Path) -> None:
    path = tmp_path / "trials.txt"
    path.write_text("1 a b.pt\n\n0\tc.pt   a\r\n 1 b c \n")
    trials = read_trials(path, ["c", "a", "b"])
    assert trials.enroll.tolist() == [1, 0, 2]
    assert trials.test.tolist() == [2, 1, 0]
    assert trials.target.tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 a b\n0 a\n", r"trials\.txt, line 2: found '0 a'; write `1 ENROLL TEST`"),
        ("1 a b\n\n2 a b\n", r"trials\.txt, line 3: found '2 a b'"),
        ("1 a b c\n", "line 1: found"),
        ("1 a b\n0 a x.wav\n", r"line 2: the split has no utterance x\.wav; choose the --split"),
        ("1 a b\n0 a lost.pt\n", r"line 2: .* lost\.pt; the build left it out, as rejects\.jsonl"),
        ("1 a b\n", r"trials\.txt: 1 target and 0 non-target trials; both"),
        ("0 a b\n", "0 target and 1 non-target"),
        ("", "0 target and 0 non-target"),
        ("\xff", "is not UTF-8 text"),
        (
            "<html><title>Sign in</title>",
            r"trials\.txt: is a web page .*; expected a list of trials",
        ),
    ],
)
def test_a_faulty_list_is_refused_by_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trials.txt"
    path.write_bytes(text.encode("latin-1"))
    left_out = LeftOut("rejects.jsonl", 1, frozenset({"lost.pt"}))
    with pytest.raises(PredictionError, match=message):
        read_trials(path, ["a", "b", "c"], left_out)
    with pytest.raises(PredictionError, match=r"nowhere\.txt: cannot be read"):
        read_trials(tmp_path / "nowhere.txt", ["a"])


@pytest.mark.parametrize(
    "rows",
    [
        ["1 s/a s/b", "0 s/a s/c"],
        ["s/a s/b target", "s/a s/c nontarget"],
        ["s/a s/b 1", "s/a s/c 0"],
        ["1\ts/a\ts/b", "0\ts/a\ts/c"],
    ],
)
def test_each_form_says_the_same(rows: list[str], tmp_path: Path) -> None:
    path = tmp_path / "trials.txt"
    path.write_text("\n".join(rows))
    found = read_list(path)
    assert (found.enroll, found.test) == (["s/a", "s/a"], ["s/b", "s/c"])
    assert found.target.tolist() == [True, False]
    assert found.lines == [1, 2]


def test_the_whole_list_says_where_the_answer_stands(tmp_path: Path) -> None:
    path = tmp_path / "trials.txt"
    path.write_text("1 0 1\n0 1 0\nspeaker 1 0\n")
    assert read_list(path).enroll == ["1", "0", "speaker"]
    path.write_text("1 0 1\n0 1 0\n0 speaker 1\n")
    assert read_list(path).enroll == ["0", "1", "speaker"]
    path.write_text("a b 1\na c 0\na d same\n")
    with pytest.raises(PredictionError, match="line 3: found 'a d same'"):
        read_list(path)


def test_names_with_blanks_are_divided_by_tabs(tmp_path: Path) -> None:
    path = tmp_path / "trials.txt"
    path.write_text("/my data/a.wav\tb c\ttarget\nd\te f\tnontarget\r\n")
    found = read_list(path)
    assert (found.enroll, found.test) == (["/my data/a.wav", "d"], ["b c", "e f"])


def test_a_miss_names_its_line_and_what_is_nearest(tmp_path: Path) -> None:
    path = tmp_path / "trials.txt"
    path.write_text("1 id1/x/00001.wav id1/x/00002.wav\n0 id1/x/00001.wav id2/z/00009.wav\n")
    keys = ["id1/x/00001", "id1/x/00002", "id2/y/00009"]
    told = (
        r"line 2: the split has no utterance id2/z/00009\.wav \(nearest: id2/y/00009\); choose the"
    )
    with pytest.raises(PredictionError, match=told):
        read_trials(path, keys)
    path.write_text("1 id1/x/00001 q\n0 p id2/y/00009\n")
    with pytest.raises(PredictionError, match=r"no utterance q \(2 of the list's 4 names are miss"):
        read_trials(path, keys)


@pytest.mark.parametrize("place", ["", "/data/vox1/test/wav/"])
def test_a_list_as_long_as_that_of_voxceleb_is_matched_whole(place: str, tmp_path: Path) -> None:
    # VoxCeleb1-O: 37,611 trials between 4,708 recordings of 40 speakers.
    rng = np.random.default_rng(0)
    keys = [f"id{10270 + n % 40}/{n // 400:02d}_-aBcDeFgH/{n:05d}" for n in range(4708)]
    enroll, test = rng.integers(0, 4708, (2, 37_611))
    target = enroll % 40 == test % 40
    path = tmp_path / "veri_test.txt"
    path.write_text(
        "".join(
            f"{same} {place}{keys[a]}.wav {place}{keys[b]}.wav\n"
            for same, a, b in zip(target.astype(int), enroll, test, strict=True)
        )
    )
    order = rng.permutation(4708)
    found = read_trials(path, [keys[n] for n in order])
    assert np.array_equal(order[found.enroll], enroll)
    assert np.array_equal(order[found.test], test)
    assert np.array_equal(found.target, target)
