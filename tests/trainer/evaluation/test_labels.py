"""What a build left out is read as it was written, and said where it matters."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import shardprep
from shardprep_trainer.errors import PredictionError
from shardprep_trainer.evaluation.labels import read_labels, read_left_out
from shardprep_trainer.evaluation.trial_lists import read_trials


@pytest.fixture
def skipped(make_dataset: Callable[..., Path], tmp_path: Path) -> tuple[Path, list[str], list[str]]:
    """Shards whose build left out 1 labelled and 2 test utterances: folder and their files."""
    source = make_dataset(test_utterances=5)
    speakers = json.loads((source / "metadata.json").read_text())["speakers"]
    test = json.loads((source / "testdata.json").read_text())["utterances"]
    labelled = [speakers["id00001"][2]["feature_path"]]
    # One is missed when the data set is looked at, the other when it is read.
    hidden = [test[1]["feature_path"], test[3]["feature_path"]]
    (source / hidden[0]).unlink()
    for name in (hidden[1], labelled[0]):
        (source / name).write_bytes(b"no tensor")
    options = shardprep.BuildOptions(workers=1, on_error="skip")
    shardprep.build_shards(source, tmp_path / "skipped", options)
    return tmp_path / "skipped", labelled, hidden


def test_what_was_left_out_is_counted_and_named(
    skipped: tuple[Path, list[str], list[str]],
) -> None:
    folder, labelled, hidden = skipped
    found = read_left_out(shardprep.open_shards(folder))
    assert found is not None
    listing = str(folder / "rejects.jsonl")
    assert found.listing == listing
    assert found.note == f"the build left 3 utterances out; they are listed in {listing}"
    assert found.ids >= {*labelled, *hidden}


def test_a_test_entry_that_lists_a_file_again_is_not_left_out(
    make_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    source = make_dataset(test_utterances=3)
    testdata = json.loads((source / "testdata.json").read_text())
    testdata["utterances"].append(testdata["utterances"][0])
    (source / "testdata.json").write_text(json.dumps(testdata))
    shardprep.build_shards(source, tmp_path / "again", shardprep.BuildOptions(workers=1))
    assert shardprep.open_shards(tmp_path / "again").rejects
    assert read_left_out(shardprep.open_shards(tmp_path / "again")) is None


def test_a_complete_data_set_has_nothing_left_out(shards: Path) -> None:
    assert read_left_out(shardprep.open_shards(shards)) is None


@pytest.mark.parametrize("content", [None, b"5\n", b"{}\n", b"\xff\n"])
def test_a_damaged_list_is_refused_by_name(
    skipped: tuple[Path, list[str], list[str]], content: bytes | None
) -> None:
    folder, _, _ = skipped
    listing = folder / "rejects.jsonl"
    listing.unlink()
    if content is not None:
        listing.write_bytes(content)
    with pytest.raises(shardprep.CorruptShardError, match=r"rejects\.jsonl: .*shardprep verify"):
        read_left_out(shardprep.open_shards(folder))


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.EMFILE])
@pytest.mark.parametrize("read", [read_labels, lambda path: read_trials(path, ["a"])])
def test_trouble_of_the_machine_is_no_fault_of_a_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, read: Callable[[Path], object]
) -> None:
    def refuse(path: Path, *args: object, **options: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    for name in ("open", "read_text", "read_bytes"):
        monkeypatch.setattr(Path, name, refuse)
    with pytest.raises(shardprep.StorageError, match=rf"list: .*{os.strerror(number)}") as caught:
        read(tmp_path / "list")
    assert caught.value.remedy


PLAIN = "Id,Category\nuttr-0.pt,id00001\nuttr-1.pt,id00002\n"
SPELLINGS = {
    "plain": PLAIN.encode(),
    "byte order mark": PLAIN.encode("utf-8-sig"),
    "UTF-16": PLAIN.replace(",", "\t").encode("utf-16"),
    "Windows": PLAIN.replace("\n", "\r\n").encode(),
    "semicolons": PLAIN.replace(",", ";").encode(),
    "tabs": PLAIN.replace(",", "\t").encode(),
    "spaces": PLAIN.replace(",", ", ").encode(),
    "quotes": b'"Id","Category"\n"uttr-0.pt","id00001"\n"uttr-1.pt","id00002"',
    "empty lines": b"\n" + PLAIN.replace("\n", "\n\n").encode(),
    "a row twice": PLAIN.encode() + b"uttr-1.pt,id00002\n",
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_labels_are_read_as_spreadsheets_write_them(tmp_path: Path, name: str) -> None:
    (tmp_path / "labels.csv").write_bytes(SPELLINGS[name])
    found = read_labels(tmp_path / "labels.csv")
    assert found == {"uttr-0.pt": "id00001", "uttr-1.pt": "id00002"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"has no row; expected the header Id,Category"),
        ("uttr-0.pt,id1\n", r"first row is 'uttr-0.pt,id1', .*: the header is missing; write Id,"),
        (
            "id,category\na.pt,b\n",
            r"first row is 'id,category', .*: make Id,Category the first row",
        ),
        (",Id,Category\n0,a.pt,b\n", r"leave only the columns Id,Category, in this order"),
        ("Category,Id\nb,a.pt\n", r"leave only the columns Id,Category, in this order"),
        (PLAIN + 'uttr-2.pt,"a\rb"\n', r"line \d+: 'a\\rb' has a line break or another control"),
        (PLAIN + "uttr-2.pt\n", "line 4: 1 values, expected Id,Category"),
        (PLAIN + "uttr-1.pt,id9\n", "line 4: uttr-1.pt occurs with two names; leave one name"),
        ("<!DOCTYPE html>", r"is a web page.*; expected a CSV of Id,Category rows"),
        ("version https://git-lfs.github.com/spec/v1\n", "run `git lfs pull`; expected a CSV"),
        ("PK\3\4\n\0[Content_Types].xml", "is a file of Office, .*; expected a CSV"),
        ("Id,Category\n\xff,a", r"is not UTF-8 text \(byte 12\); save it as UTF-8"),
    ],
)
def test_what_is_no_list_of_labels_is_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "labels.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(PredictionError, match=rf"labels\.csv(: |, ).*{said}"):
        read_labels(tmp_path / "labels.csv")
