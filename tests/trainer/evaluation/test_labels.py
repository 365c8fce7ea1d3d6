"""What a build left out is read as it was written, and said where it matters."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import shardprep
from shardprep_trainer.evaluation.labels import read_labels, read_left_out
from shardprep_trainer.evaluation.trials import read_trials


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
    assert found.listing == folder / "rejects.jsonl"
    assert found.note == f"the build left 3 utterances out; {folder / 'rejects.jsonl'} lists them"
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

    for name in ("open", "read_text"):
        monkeypatch.setattr(Path, name, refuse)
    with pytest.raises(shardprep.StorageError, match=rf"list: .*{os.strerror(number)}") as caught:
        read(tmp_path / "list")
    assert caught.value.remedy
