"""Several tars give one set: its labels, and what does not fit together is named."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardprep import SourceError
from shardprep.build.foreign.join import Joined, join
from shardprep.build.foreign.scan import Found, TarRecord
from shardprep.build.foreign.tars import ForeignTar


def utterance(
    key: str, name: str | None = None, number: str | None = None, n_mels: int = 40
) -> Found:
    return Found(key, 512, 128 + 2 * 5 * n_mels, 5, n_mels, "float16", 7, name, number)


def joined(*tars: tuple[str, list[Found]], speaker: str | None = None) -> Joined:
    return join(
        [
            (
                ForeignTar(f"/real/{split}{at}", f"/shown/{split}{at}", split),
                TarRecord("", 10240, "0" * 64, tuple(found), ()),
            )
            for at, (split, found) in enumerate(tars)
        ],
        speaker,
    )


def labels(set_: Joined) -> dict[str, int]:
    return {row.key: row.label for record in set_.records for row in record.rows}


@given(st.permutations(range(12)))
def test_class_numbers_from_0_keep_their_values(order: list[int]) -> None:
    found = [utterance(f"u{n}", number=str(n)) for n in order]
    set_ = joined(("train", found))
    assert labels(set_) == {f"u{n}": n for n in order}
    assert set_.speakers == tuple(map(str, range(12)))
    assert not set_.notes


def test_names_are_numbered_in_sorted_order_and_other_class_numbers_are_noted() -> None:
    found = [utterance("a", "zoe", "0"), utterance("b", "ann", "1"), utterance("c", "zoe", "0")]
    set_ = joined(("train", found))
    assert set_.speakers == ("ann", "zoe")
    assert labels(set_) == {"a": 1, "b": 0, "c": 1}
    (note,) = set_.notes
    assert "such as 1 for speaker ann, whose label is 0" in note
    gap = joined(("train", [utterance("a", number="10"), utterance("b", number="9")]))
    assert gap.speakers == ("9", "10")
    assert "such as 9 for speaker 9, whose label is 0" in gap.notes[0]


def test_names_count_before_class_numbers_for_all_utterances() -> None:
    set_ = joined(("train", [utterance("a", "ann", "0"), utterance("b", None, "1")]))
    assert labels(set_) == {"a": 0}
    assert [(reject.key, reject.reason) for reject in set_.rejects] == [
        ("b", "has no speaker in its .json, and others have one")
    ]


def test_utterances_without_speakers_stay_where_nobody_has_one_or_in_test() -> None:
    nobody = joined(("train", [utterance("a"), utterance("b")]))
    assert labels(nobody) == {"a": -1, "b": -1}
    assert len(nobody.notes) == 1
    assert "all labels are -1; if" in nobody.notes[0]
    assert "--speaker FIELD" in nobody.notes[0]
    test = joined(
        ("test", [utterance("a"), utterance("b", number="3")]),
        ("train", [utterance("c", number="0"), utterance("d", number="3")]),
    )
    assert labels(test) == {"a": -1, "b": 1, "c": 0, "d": 1}


def test_speakers_that_are_not_in_train_are_noted() -> None:
    set_ = joined(("train", [utterance("a", "x")]), ("val", [utterance("b", "y")]))
    assert set_.notes == ["these speakers are in val, but not in train: y"]


def test_the_most_frequent_shape_is_that_of_the_set() -> None:
    found = [utterance("odd", n_mels=80), *(utterance(f"u{n}") for n in range(3))]
    set_ = joined(("train", found))
    assert (set_.dtype, set_.n_mels) == ("float16", 40)
    (reject,) = set_.rejects
    assert reject.key == "odd"
    assert reject.reason == "is float16 with 80 columns, and 3 others are float16 with 40"


def test_a_key_is_in_a_split_once_and_may_be_in_others_too() -> None:
    set_ = joined(
        ("train", [utterance("a"), utterance("b")]),
        ("train", [utterance("a"), utterance("c")]),
        ("test", [utterance("a")]),
    )
    (reject,) = set_.rejects
    assert (reject.file, reject.key) == ("/shown/train1", "a")
    assert reject.reason == "the split train has this key in /shown/train0 too"
    assert [record.info.samples for record in set_.records] == [2, 1, 1]


def test_shards_are_numbered_by_split_and_tars_without_utterances_are_left_out() -> None:
    set_ = joined(
        ("val", [utterance("v")]),
        ("train", []),
        ("train", [utterance("a")]),
        ("train", [utterance("b")]),
    )
    assert set_.targets == {
        "train-000000.tar": "/real/train2",
        "train-000001.tar": "/real/train3",
        "val-000000.tar": "/real/val0",
    }
    assert [record.info.file for record in set_.records] == list(set_.targets)


def test_a_field_that_no_member_has_is_refused() -> None:
    with pytest.raises(SourceError, match="no .json member has a field 'spk'"):
        joined(("train", [utterance("a", None, "3")]), speaker="spk")
