"""Which utterance a name means: by suffixes and folders, and never one that merely ends alike."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardprep_trainer.evaluation.names import SEVERAL, Names

KEYS = ["id1/x/00001", "id1/y/00001", "id2/x/00002", "alone"]


@pytest.mark.parametrize(
    ("name", "position"),
    [
        ("id1/x/00001", 0),
        ("id1/x/00001.wav", 0),
        ("id1/x/00001.FLAC", 0),
        ("./id1/x/00001.m4a", 0),
        ("id1\\y\\00001.wav", 1),
        ("/data/vox 1/wav/id1/y/00001.wav", 1),
        ("/data/alone.pt", 3),
        # The end of one key alone.
        ("x/00002.wav", 2),
        ("00002", 2),
        # Of two.
        ("00001.wav", SEVERAL),
        # Nobody's: the rest differs, or the suffix is none.
        ("id3/x/00001.wav", None),
        ("/data/id2/y/00002.wav", None),
        ("0001.wav", None),
        ("id1/x/00001.7", None),
        ("xid1/x/00001", None),
    ],
)
def test_a_name_means_the_utterance_that_it_names_whole(name: str, position: int | None) -> None:
    assert Names(KEYS).find([name]).get(name) == position


def test_folders_that_all_keys_begin_with_need_not_be_in_a_name() -> None:
    names = Names([f"vox/wav/{key}" for key in KEYS])
    assert names.find(["/other/place/id2/x/00002.wav"]) == {"/other/place/id2/x/00002.wav": 2}
    assert names.find(["/other/place/id2/y/00002.wav"]) == {}


def test_dots_in_a_name_are_the_hyphens_of_keys_of_recordings() -> None:
    names = Names(["ann/take-1-a", "ann/take.2", "st.ann/b"])
    assert names.find(
        ["ann/take.1.a.wav", "/d/ann/take.1.a.wav", "ann/take.2", "st.ann/b.m4a"]
    ) == {
        "ann/take.1.a.wav": 0,
        "/d/ann/take.1.a.wav": 0,
        "ann/take.2": 1,
        "st.ann/b.m4a": 2,
    }


def test_keys_may_have_suffixes_themselves() -> None:
    names = Names(["d/a.wav", "d/b.wav", "d/b.flac"])
    assert names.find(["a", "d/a", "d/b.wav", "d/b", "/x/d/a.mp3"]) == {
        "a": 0,
        "d/a": 0,
        "d/b.wav": 1,
        "d/b": SEVERAL,
        "/x/d/a.mp3": 0,
    }


def test_names_that_differ_in_their_folders_are_not_taken_for_one_utterance() -> None:
    names = Names(["00001", "00002"])
    assert names.find(["/id1/00001.wav", "/id2/00002.wav"]) == {
        "/id1/00001.wav": 0,
        "/id2/00002.wav": 1,
    }
    assert names.find(["/id1/00001.wav", "/id2/00001.wav"]) == {
        "/id1/00001.wav": SEVERAL,
        "/id2/00001.wav": SEVERAL,
    }
    # One says more than the other, and nothing else.
    assert set(names.find(["id1/00001.wav", "/data/id1/00001.wav"]).values()) == {0}


def test_a_key_of_two_utterances_means_neither() -> None:
    assert Names(["a", "b", "a"]).find(["a", "b.wav", "/x/a.wav"]) == {
        "a": SEVERAL,
        "b.wav": 1,
        "/x/a.wav": SEVERAL,
    }


def test_an_exact_key_goes_before_the_end_of_another() -> None:
    names = Names(["x/a", "a", "y/a"])
    assert names.find(["a", "x/a", "/z/y/a", "/z/a"]) == {"a": 1, "x/a": 0, "/z/y/a": 2, "/z/a": 1}


paths = st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map("/".join)


@given(st.lists(paths, min_size=1, max_size=6, unique=True), st.lists(paths, max_size=3))
def test_what_is_found_ends_in_the_name_or_is_its_end(keys: list[str], names: list[str]) -> None:
    folders = [key.split("/")[:-1] for key in keys]
    alike = 0
    while all(own[alike : alike + 1] == folders[0][alike : alike + 1] != [] for own in folders):
        alike += 1
    for name, position in Names(keys).find(names).items():
        if position == SEVERAL:
            continue
        key = keys[position]
        below = "/".join(key.split("/")[alike:])
        pairs = ((key, name), (name, key), (name, below))
        assert any(f"/{one}".endswith(f"/{other}") for one, other in pairs)
        if name in keys:
            assert key == name


def test_the_nearest_of_many_is_found_by_either_end() -> None:
    keys = [f"id{n:04d}/{n * 7919 % 1000:03d}/{n % 20:05d}" for n in range(20_000)]
    names = Names(keys)
    assert names.nearest("id0123/037/00003.wav") == keys[123] == "id0123/037/00003"
    assert names.nearest("xid19999/081/00019") == keys[19_999]
    assert names.nearest("/a/long/way/to/all/recordings/of/id0123/037/00004.wav") == keys[123]
    assert names.nearest("~") is None
