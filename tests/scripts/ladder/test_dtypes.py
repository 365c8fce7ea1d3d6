"""Accuracy by element type: what is compared, and with what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scripts.ladder import dtypes


def _runs(*accuracies: float) -> list[dict[str, Any]]:
    return [{"rung": "boss", "seed": n, "test_accuracy": x} for n, x in enumerate(accuracies)]


@pytest.mark.parametrize(("third", "within"), [(0.75, True), (0.60, False)])
def test_types_are_compared_by_their_means_and_the_widest_of_their_seeds(
    third: float, within: bool
) -> None:
    runs = {"float16": _runs(0.70, 0.72, 0.74), "uint8": _runs(third, third + 0.01, third)}
    swapped = [
        {"rung": "boss", "seed": n, "utterances": 100, "correct": 70, "correct_on_uint8": 69}
        | {"other_answers": n}
        for n in range(3)
    ]
    found = dtypes.compare(runs, swapped)["boss"]
    assert found["seeds"] == pytest.approx(0.04)
    assert found["difference"] == pytest.approx(third + 0.01 / 3 - 0.72)
    assert found["within"] is within
    assert found["same_weights"] == {
        "utterances": 300,
        "correct": 210,
        "correct_on_uint8": 207,
        "other_answers": 3,
    }
    assert "| boss | 0.7200 (0.7000 to 0.7400) |" in dtypes.table({"boss": found})


def test_the_same_weights_answer_for_both_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    float16, uint8 = (dtypes.places_of(tmp_path, tmp_path, name) for name in dtypes.DTYPES)
    (float16.work / "submissions").mkdir(parents=True)
    uint8.labels.write_text("Id,Category\na.pt,x\nb.pt,y\nc.pt,z\n")
    (float16.work / "submissions" / "run.csv").write_text("Id,Category\na.pt,x\nb.pt,y\nc.pt,x\n")

    def predict(command: list[str], *_: object) -> str:
        assert command[command.index("--shards") + 1] == str(uint8.shards)
        out = Path(command[command.index("--out") + 1])
        out.write_text("Id,Category\na.pt,x\nb.pt,x\nc.pt,z\n")
        return ""

    monkeypatch.setattr(dtypes, "run_command", predict)
    run = {"name": "run", "rung": "boss", "seed": 4, "test_utterances": 3, "test_correct": 2}
    assert dtypes.swap(run, float16, uint8) == {
        "rung": "boss",
        "seed": 4,
        "utterances": 3,
        "correct": 2,
        "correct_on_uint8": 2,
        "other_answers": 2,
    }
