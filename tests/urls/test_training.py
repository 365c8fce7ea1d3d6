"""A run learns the same from a store as from the disk, and reports its waits for the network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shardprep import BuildOptions, build_shards
from tests.conftest import write_dataset

pytestmark = pytest.mark.remote


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


def run(place: str, runs: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Train in a process of its own, because later tests may fork this one."""
    words = [
        *("--config", "smoke", "--train.runs", runs, "--data.shards", place),
        *("--data.order", "windowed", "--data.lanes", "2", "--data.window_shards", "1"),
        *("--data.cache_folder", runs / "cache", "--data.cache_gb", "0.01"),
        *("--train.total_steps", "12", "--train.log_steps", "2", "--train.valid_steps", "6"),
        *more,
    ]
    return start("train", *words)


def start(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shardprep", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


def records(runs: Path) -> list[dict[str, Any]]:
    lines = next(runs.glob("*/metrics.jsonl")).read_text().splitlines()
    return [json.loads(line) for line in lines]


def learnt(runs: Path) -> list[Any]:
    return [(r["event"], r["step"], r["loss"], r["accuracy"]) for r in records(runs)]


@pytest.mark.slow
def test_a_run_learns_the_same_from_a_store_and_resumes_there(
    places: dict[str, str], proxy: Any, tmp_path: Path
) -> None:
    # Slow enough that a step waits for a shard, even if the run starts slowly.
    proxy.faults = type(proxy.faults)(match=r"train-.*\.tar", delay=0.5)
    for done in (
        run(places["disk"], tmp_path / "disk"),
        run(places["store"], tmp_path / "store", "--train.stop_step", "7"),
        run(places["store"], tmp_path / "store", "--resume"),
    ):
        assert done.returncode == 0, done.stderr
    assert learnt(tmp_path / "store") == learnt(tmp_path / "disk")
    assert len(learnt(tmp_path / "disk")) == 8
    shares = [r for r in records(tmp_path / "store") if r["event"] == "train"]
    assert all(0 <= r["network"] <= r["waiting"] <= 1 for r in shares)
    assert any(r["network"] > 0 for r in shares)
    assert all(r["network"] == 0 for r in records(tmp_path / "disk") if r["event"] == "train")

    submissions = []
    for name, place in places.items():
        out = tmp_path / f"{name}.csv"
        trained = next((tmp_path / "store").glob("smoke*"))
        done = start("predict", trained, "--shards", place, "--out", out)
        assert done.returncode == 0, done.stderr
        submissions.append(out.read_text())
    assert submissions[0] == submissions[1]


def test_a_store_without_the_set_ends_the_run_with_its_name(store: Any, tmp_path: Path) -> None:
    done = run(store.url("nothing"), tmp_path)
    assert done.returncode == 4
    assert f"{store.url('nothing')}/manifest.json: there is no shard set" in done.stderr


def test_a_cache_that_is_too_small_ends_the_run_with_what_to_change(
    places: dict[str, str], tmp_path: Path
) -> None:
    done = run(places["store"], tmp_path, "--data.cache_gb", "0.0001")
    assert done.returncode == 6
    assert "fewer lanes or window_shards" in done.stderr
