"""Which recordings a user means, and what is made of them ahead."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardprep_trainer.errors import PredictionError
from shardprep_trainer.pretrained.recordings import Recording, ahead, find_recordings


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_a_folder_stands_for_all_recordings_below_it(tmp_path: Path) -> None:
    touch(tmp_path, "b/2.WAV", "b/1.0.flac", "a/x/y.m4a", "c.txt", ".hidden/z.wav", "b/.z.wav")
    found = find_recordings([tmp_path])
    expected = {"a/x/y": "a/x/y.m4a", "b/1-0": "b/1.0.flac", "b/2": "b/2.WAV"}
    assert {recording.key: recording.path for recording in found} == {
        key: tmp_path / path for key, path in expected.items()
    }
    (tmp_path / "empty").mkdir()
    with pytest.raises(PredictionError, match="empty: there is no recording in it"):
        find_recordings([tmp_path / "empty"])


LISTS = {
    "a.csv": "key,path,start,end\n,x/1.wav,,\nown,/abs/2.wav,1.5,\nc,3.wav,,2\n",
    "a.tsv": "path\tkey\tstart\tend\nx/1.wav\t\t\t\n/abs/2.wav\town\t1.5\t\n3.wav\tc\t\t2\n",
    "a.jsonl": '{"path": "x/1.wav"}\n\n{"path": "/abs/2.wav", "key": "own", "start": 1.5}\n'
    '{"path": "3.wav", "key": "c", "end": 2}\n',
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_names_recordings_beside_it_and_pieces_of_them(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(LISTS[name])
    assert find_recordings([tmp_path / name]) == [
        Recording(tmp_path / "x/1.wav", "x/1"),
        Recording(Path("/abs/2.wav"), "own", 1.5),
        Recording(tmp_path / "3.wav", "c", None, 2.0),
    ]


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("a.csv", "file\nx.wav\n", "names no column path"),
        ("a.csv", "path,start\nx.wav,soon\n", "line 2: start is 'soon', expected seconds"),
        ("a.csv", "path,start\n,1\n", "line 2 has no path"),
        ("a.jsonl", '{"path": "x.wav"}\n[1]\n', "line 2 has no path"),
        ("a.jsonl", "{\n", "is no list of recordings"),
        ("a.csv", None, "there is no such list"),
    ],
)
def test_a_faulty_list_is_named_with_its_line(
    tmp_path: Path, name: str, text: str | None, part: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(PredictionError, match=part) as caught:
        find_recordings([tmp_path / name])
    assert str(tmp_path / name) in str(caught.value)


def test_results_come_in_order_with_faults_in_their_places() -> None:
    def make(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        return number * number

    found = [str(each) for each in ahead(make, range(8))]
    assert found == ["0", "1", "4", "three", "16", "25", "36", "49"]


def test_an_error_that_is_no_fault_of_a_recording_ends_it() -> None:
    def make(number: int) -> int:
        if number == 2:
            raise OSError("the machine")
        return number

    with pytest.raises(OSError, match="the machine"):
        list(ahead(make, range(100)))
