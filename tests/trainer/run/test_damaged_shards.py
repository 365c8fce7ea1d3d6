"""A flipped bit, and a set that replaces the one that is trained on, are always noticed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shardprep
from shardprep import CorruptShardError
from shardprep_trainer.config.fields import Config
from shardprep_trainer.errors import ConfigError
from shardprep_trainer.learning.step import TrainStep
from shardprep_trainer.run.start import prepare
from shardprep_trainer.run.trainer import Outcome, Trainer

ConfigFactory = Callable[..., Config]
SKIP = {"data.on_corrupt": "skip"}


def train(config: Config, *, resume: bool = False) -> Outcome:
    trainer = Trainer(prepare(config, resume=resume))
    try:
        return trainer.fit()
    finally:
        trainer.close()


def records(config: Config, event: str) -> list[dict[str, Any]]:
    lines = (config.run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["event"] == event]


def damage(shards: Path, name: str, index: int) -> str:
    """Flip a bit in an utterance of a split of one shard; returns its key."""
    split = shardprep.open_shards(shards)[name]
    row = split.locations[index]
    path = shards / f"{name}-000000.tar"
    data = bytearray(path.read_bytes())
    data[int(row["offset"]) + int(row["nbytes"]) // 2] ^= 1
    path.write_bytes(data)
    return str(split.keys[index])


@pytest.mark.parametrize("name", ["train", "val"])
def test_damage_ends_the_run_and_is_named(
    make_config: ConfigFactory, shards: Path, name: str
) -> None:
    key = damage(shards, name, 2)
    with pytest.raises(CorruptShardError) as caught:
        train(make_config())
    assert caught.value.key == key


def test_skipped_damage_is_counted_and_the_run_ends_well(
    make_config: ConfigFactory, shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = {damage(shards, "train", 2), damage(shards, "train", 5), damage(shards, "val", 0)}
    config = make_config(**SKIP)
    assert train(config).finished
    rows = records(config, "train")
    # 12 steps of 4 go twice through 24 utterances.
    assert sum(row["corrupt"] for row in rows) == 4
    for row in records(config, "valid"):
        assert row["utterances"] == 5
    assert all(any(key in text for text in caplog.messages) for key in keys)


def test_undamaged_shards_count_nothing(make_config: ConfigFactory) -> None:
    config = make_config()
    train(config)
    assert [row["corrupt"] for row in records(config, "train")] == [0] * 6


def test_a_resumed_run_skips_the_same(make_config: ConfigFactory, shards: Path) -> None:
    damage(shards, "train", 2)
    uninterrupted = make_config(name="uninterrupted", **SKIP)
    train(uninterrupted)
    train(make_config(name="parts", **SKIP, **{"train.stop_step": 4}))
    parts = make_config(name="parts", **SKIP)
    train(parts, resume=True)

    def losses(config: Config) -> list[float]:
        return [row["loss"] for row in records(config, "train")]

    assert losses(parts) == losses(uninterrupted)


def test_too_much_damage_ends_the_run(make_config: ConfigFactory, shards: Path) -> None:
    for index in range(3):
        damage(shards, "train", index)
    with pytest.raises(CorruptShardError, match="3 utterances are damaged, and max_corrupt is 2"):
        train(make_config(**SKIP, **{"data.max_corrupt": 2}))


def test_skipping_without_checking_is_refused(make_config: ConfigFactory) -> None:
    with pytest.raises(ConfigError, match="data.verify_reads"):
        make_config(**SKIP, **{"data.verify_reads": "never"})


def test_a_set_replaced_during_a_run_is_reported_and_the_run_continues(
    make_config: ConfigFactory, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = make_config(name="undisturbed")
    train(undisturbed)
    original = TrainStep.__call__

    def replacing(self: TrainStep, batches: Any, step: int) -> None:
        if step == 3:
            options = shardprep.BuildOptions(val_fraction=0.2, workers=1, overwrite=True, seed=1)
            shardprep.build_shards(shards.parent / "Dataset", shards, options)
        original(self, batches, step)

    config = make_config()
    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", replacing)
        assert train(config).finished
    (warning,) = records(config, "warning")
    assert "changed while it was being read" in warning["text"]
    assert "resumed only on the set that it began on" in warning["text"]
    assert [row["loss"] for row in records(config, "train")] == [
        row["loss"] for row in records(undisturbed, "train")
    ]
    assert records(config, "valid")[-1]["accuracy"] == records(undisturbed, "valid")[-1]["accuracy"]
    with pytest.raises(ConfigError, match="has fingerprint .*, but the run to resume began on"):
        train(make_config(**{"train.total_steps": 14}), resume=True)
