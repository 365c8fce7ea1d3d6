"""A run learns from a store what it learns from the disk, and says how long the network took."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from shardprep import BuildOptions, build_shards
from tests.conftest import write_dataset
from trainer.predict import main as predict
from trainer.train import main as train

pytestmark = pytest.mark.remote
SMOKE = Path(__file__).resolve().parents[2] / "trainer" / "recipes" / "smoke.yaml"


@pytest.fixture(scope="module")
def places(store: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One set on the disk and in the store."""
    folder = tmp_path_factory.mktemp("trained")
    source = write_dataset(folder / "Dataset", speakers=4, utterances=12, test_utterances=6)
    options = BuildOptions(samples_per_shard=4, val_fraction=0.2, workers=1)
    found = {"disk": str(folder / "shards"), "store": store.url("trained")}
    for place in found.values():
        build_shards(source, place, options)
    return found


def run(place: str, runs: Path, *more: str) -> int:
    return train(
        [
            *("--config", str(SMOKE), "--train.runs", str(runs), "--data.shards", place),
            *("--data.order", "windowed", "--data.lanes", "2", "--data.window_shards", "1"),
            *("--data.cache_folder", str(runs / "cache"), "--data.cache_gb", "0.01"),
            *("--train.total_steps", "12", "--train.log_steps", "2", "--train.valid_steps", "6"),
            *more,
        ]
    )


def records(runs: Path) -> list[dict[str, Any]]:
    lines = next(runs.glob("*/metrics.jsonl")).read_text().splitlines()
    return [json.loads(line) for line in lines]


def learnt(runs: Path) -> list[Any]:
    return [(r["event"], r["step"], r["loss"], r["accuracy"]) for r in records(runs)]


def test_a_run_learns_the_same_from_a_store_and_goes_on_there(
    places: dict[str, str], tmp_path: Path
) -> None:
    assert run(places["disk"], tmp_path / "disk") == 0
    assert run(places["store"], tmp_path / "store", "--train.stop_step", "7") == 0
    assert run(places["store"], tmp_path / "store", "--resume") == 0
    assert learnt(tmp_path / "store") == learnt(tmp_path / "disk")
    assert len(learnt(tmp_path / "disk")) == 8
    shares = [r for r in records(tmp_path / "store") if r["event"] == "train"]
    assert all(0 <= r["network"] <= r["waiting"] <= 1 for r in shares)
    assert shares[0]["network"] > 0
    assert all(r["network"] == 0 for r in records(tmp_path / "disk") if r["event"] == "train")

    submissions = []
    for name, place in places.items():
        out = tmp_path / f"{name}.csv"
        words = [str(next((tmp_path / "store").glob("smoke*"))), "--shards", place]
        done = CliRunner().invoke(predict, [*words, "--out", str(out)])
        assert done.exit_code == 0, done.output
        submissions.append(out.read_text())
    assert submissions[0] == submissions[1]


def test_a_store_without_the_set_ends_the_run_with_its_name(
    store: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(store.url("nothing"), tmp_path) == 4
    assert f"{store.url('nothing')}/manifest.json: there is no shard set" in capsys.readouterr().err


def test_a_cache_that_is_too_small_ends_the_run_with_what_to_change(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(places["store"], tmp_path, "--data.cache_gb", "0.0001") == 6
    assert "fewer lanes or window_shards" in capsys.readouterr().err
