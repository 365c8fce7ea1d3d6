"""What must be right before any work starts, decided from the arguments alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from saved_models import make_training
from shardprep_trainer.config.fields import Config, DataConfig
from shardprep_trainer.errors import ConfigError
from shardprep_trainer.run.preflight import check_same_run, open_data

import shardprep
from shardprep.format.manifest import encode_manifest

ConfigFactory = Callable[..., Config]


def empty(shards: Path, split: str) -> None:
    """Leave a split in the manifest, without an utterance."""
    manifest = shardprep.open_shards(shards).manifest
    info = msgspec.structs.replace(manifest.splits[split], samples=0, frames=0, shards=())
    splits = {**manifest.splits, split: info}
    changed = msgspec.structs.replace(manifest, splits=splits)
    (shards / "manifest.json").write_bytes(encode_manifest(changed))


def test_an_empty_split_is_refused_like_a_missing_one(shards: Path) -> None:
    empty(shards, "val")
    with pytest.raises(ConfigError, match=r"no utterances in a val split.*--train\.valid_steps 0"):
        open_data(DataConfig(str(shards)), validated=True)
    assert open_data(DataConfig(str(shards)), validated=False).path == shards
    empty(shards, "train")
    with pytest.raises(ConfigError, match="no utterances in a train split, only in test;"):
        open_data(DataConfig(str(shards)), validated=False)


LAUNCH: dict[str, Any] = {"global_batch": 8, "precision": "no", "processes": 2}


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ({}, {}),
        ({"precision": "bf16"}, {"mixed precision": ("bf16", "no")}),
        ({"processes": 4}, {"processes": (4, 2)}),
    ],
)
def test_another_launch_is_told_and_allowed(
    before: dict[str, Any], expected: dict[str, Any], make_config: ConfigFactory
) -> None:
    config = make_config()
    began = make_training(**{**LAUNCH, **before})
    assert check_same_run(config, config, began, **LAUNCH) == expected


def test_another_global_batch_is_refused_with_the_processes_it_came_from(
    make_config: ConfigFactory,
) -> None:
    config, began = make_config(), make_training(**LAUNCH)
    with pytest.raises(
        ConfigError,
        match=r"found 4 segments.* began with 8 on 2 process\(es\).*--data\.global_batch",
    ):
        check_same_run(config, config, began, global_batch=4, precision="no", processes=1)
