"""What a build left out is read as it was written, and said where it matters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import shardprep
from shardprep_trainer.evaluation.labels import LeftOut, read_left_out


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
    assert (found.total, sorted(found.test)) == (3, sorted(hidden))
    assert found.ids >= {*labelled, *hidden}


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


def test_notes_on_test_rows_come_only_when_the_test_split_is_predicted() -> None:
    test = tuple(f"uttr-{n}.pt" for n in range(5))
    left_out = LeftOut(Path("x/rejects.jsonl"), 1234, test, frozenset(test))
    first, second = left_out.notes("test")
    assert "1,234 utterances" in first
    assert "x/rejects.jsonl" in first
    assert second.startswith("5 of them are test utterances")
    assert second.endswith("uttr-0.pt, uttr-1.pt, uttr-2.pt, ...")
    assert left_out.notes("val") == [first]
    few = LeftOut(Path("x/rejects.jsonl"), 2, test[:2], frozenset(test))
    assert few.notes("test")[1].endswith(" uttr-0.pt, uttr-1.pt")
    none = LeftOut(Path("x/rejects.jsonl"), 2, (), frozenset())
    assert len(none.notes("test")) == 1
