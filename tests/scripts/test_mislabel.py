"""Swapped labels: how many, whose, and what a list of suspects is worth."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

import shardprep
from scripts.mislabel import compare, main, swap_labels


def entries(**counts: int) -> dict[str, list[dict[str, str]]]:
    return {
        name: [{"feature_path": f"{name}-{number}.pt"} for number in range(count)]
        for name, count in counts.items()
    }


@pytest.mark.parametrize(("share", "swapped"), [(0.0, 0), (0.1, 10), (0.5, 50)])
def test_pairs_of_two_speakers_exchange_their_labels(share: float, swapped: int) -> None:
    speakers = entries(a=50, b=30, c=20)
    changed = swap_labels(speakers, share, 0)
    wrong = {
        row["feature_path"].removesuffix(".pt"): (name, row["feature_path"][0])
        for name, rows in speakers.items()
        for row in rows
        if row["feature_path"][0] != name
    }
    assert changed == wrong
    assert len(wrong) == swapped
    assert [len(rows) for rows in speakers.values()] == [50, 30, 20]


def test_no_more_labels_are_swapped_than_there_are_pairs() -> None:
    assert len(swap_labels(entries(a=5, b=1), 1.0, 0)) == 2
    assert swap_labels(entries(a=5), 1.0, 0) == {}


def test_precision_and_recall_are_counted_over_the_judged_utterances() -> None:
    rows = [
        {"key": key, "nearest": nearest, "verdict": verdict}
        for key, nearest, verdict in [
            ("u1", "a", "wrong speaker"),
            ("u9", "b", "sounds like nobody"),
            ("u2", "x", "wrong speaker"),
            ("u8", "b", "wrong speaker"),
        ]
    ]
    # u4 was swapped, but is not among the judged.
    truth = {"u1": "a", "u2": "b", "u3": "c", "u4": "d"}
    found = compare(rows, truth, ["u1", "u2", "u3", "u8", "u9"])
    assert (found["utterances"], found["swapped"], found["named"]) == (5, 3, 0.5)
    assert found["all"] == {"listed": 4, "precision": 2 / 4, "recall": 2 / 3}
    assert found["first"] == {"listed": 3, "precision": 2 / 3, "recall": 2 / 3}
    assert found["wrong speaker"] == {"listed": 3, "precision": 2 / 3, "recall": 2 / 3}


def test_a_swapped_data_set_is_built_and_compared(
    make_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    root, target = make_dataset(speakers=4, utterances=10, test_utterances=3), tmp_path / "new"
    words = ["swap", str(root), str(target), "--share", "0.2"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    with (target / "swapped.csv").open(newline="") as file:
        swapped = list(csv.DictReader(file))
    assert len(swapped) == 8
    shardprep.build_shards(target / "Dataset", target / "shards", shardprep.BuildOptions(workers=1))
    shards = shardprep.open_shards(target / "shards")
    for name in ("train", "val"):
        part = shards[name]
        given = dict(zip(part.keys, (shards.speakers[label] for label in part.labels), strict=True))
        for row in swapped:
            assert given.get(row["key"], row["given"]) == row["given"] != row["truth"]
    keys = set(shards["train"].keys)
    judged = [row for row in swapped if row["key"] in keys]
    list_of = tmp_path / "suspects.csv"
    with list_of.open("w", newline="") as file:
        file.write("key,nearest,verdict\n")
        file.writelines(f"{row['key']},{row['truth']},wrong speaker\n" for row in judged)
    words = ["compare", str(list_of), str(target / "swapped.csv"), str(target / "shards")]
    found = json.loads(CliRunner().invoke(main, words).stdout)
    assert (found["utterances"], found["swapped"]) == (len(keys), len(judged))
    assert found["all"] == {"listed": len(judged), "precision": 1, "recall": 1}
    # The same folder is not written to again.
    assert CliRunner().invoke(main, ["swap", str(root), str(target)]).exit_code == 2
