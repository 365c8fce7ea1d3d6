"""The data of a run: sets that cannot be trained on, and what each process gets of a batch."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

import shardprep
from shardprep.format.manifest import encode_manifest
from shardprep_trainer.config.checks import parse_config
from shardprep_trainer.config.fields import Config, DataConfig
from shardprep_trainer.errors import ConfigError
from shardprep_trainer.run.data import batch_of_each, build_train_loader, open_data

ConfigFactory = Callable[..., Config]
CPU = torch.device("cpu")


def test_without_a_global_batch_each_process_has_its_own() -> None:
    assert [batch_of_each(DataConfig(batch_size=5), world) for world in (1, 2, 7)] == [5, 5, 5]


def test_a_global_batch_is_the_same_at_every_number_of_processes_that_can_share_it() -> None:
    data = DataConfig(batch_size=5, global_batch=24)
    for world in range(1, 30):
        if 24 % world:
            with pytest.raises(ConfigError, match=f"found 24 on {world} processes"):
                batch_of_each(data, world)
        else:
            assert batch_of_each(data, world) * world == 24


@pytest.mark.parametrize(
    ("data", "allowed"),
    [
        (DataConfig(global_batch=12), "start 1, 2, 3, 4, 6, 12 processes, or give a multiple of 5"),
        # A process reads complete lanes.
        (DataConfig(global_batch=24, order="windowed", lanes=8), "start 1, 2, 4, 8 processes"),
    ],
)
def test_the_numbers_of_processes_that_would_do_are_named(data: DataConfig, allowed: str) -> None:
    with pytest.raises(ConfigError, match=allowed):
        batch_of_each(data, 5)


def test_a_split_smaller_than_the_global_batch_is_refused_by_its_name(
    make_config: ConfigFactory,
) -> None:
    config = make_config(**{"data.global_batch": 26})
    shards = shardprep.open_shards(config.data.shards)
    with pytest.raises(ConfigError, match=r"data\.global_batch: found 26.* only 24 utterances"):
        build_train_loader(config, shards, 0, 2, CPU)


@pytest.mark.parametrize("value", ["0", "-8", "9"])
def test_a_global_batch_that_cannot_work_is_refused_before_any_work(
    value: str, make_config: ConfigFactory
) -> None:
    with pytest.raises(ConfigError, match=r"data\.global_batch: found"):
        make_config(**{"data.global_batch": value, "data.order": "windowed", "data.lanes": 4})


def test_configurations_from_before_there_was_a_global_batch_still_load(
    make_config: ConfigFactory, tmp_path: Path
) -> None:
    config = make_config()
    saved = config.to_dict()
    del saved["data"]["global_batch"]
    assert parse_config(saved) == config


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
    assert open_data(DataConfig(str(shards)), validated=False).where == str(shards)
    empty(shards, "train")
    with pytest.raises(ConfigError, match="no utterances in a train split, only in test;"):
        open_data(DataConfig(str(shards)), validated=False)


def test_adopted_tars_without_speakers_are_refused_with_the_option_that_names_them(
    tmp_path: Path,
) -> None:
    member = io.BytesIO()
    np.save(member, np.zeros((9, 4), np.float32))
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        about = tarfile.TarInfo("a.npy")
        about.size = len(member.getvalue())
        tar.addfile(about, io.BytesIO(member.getvalue()))
    shardprep.adopt_shards(tmp_path / "train.tar", tmp_path / "set", workers=1)
    with pytest.raises(ConfigError, match="1 of the 1 utterances of split train .*--speaker FIELD"):
        open_data(DataConfig(shards=str(tmp_path / "set")), validated=False)


def test_batches_of_a_set_of_uint8_have_the_values_that_it_stands_for(
    make_config: ConfigFactory, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    with shardprep.ShardWriter(tmp_path / "bytes", 40, dtype="uint8", val_fraction=0) as writer:
        for number in range(10):
            mel = rng.normal(-4, 3, (int(rng.integers(50, 200)), 40))
            writer.add(f"u{number}", mel.astype(np.float32), speaker=f"s{number % 2}")
    config = make_config(**{"data.shards": tmp_path / "bytes", "data.segment_frames": 300})
    shards = open_data(config.data, validated=False)
    split = shards["train"]
    whole = {read.tobytes() for read in map(split.read, range(len(split)))}
    for batch in build_train_loader(config, shards, 0, 1, CPU):
        assert batch["mel"].dtype == torch.float32
        for mel, length in zip(batch["mel"], batch["length"].tolist(), strict=True):
            assert mel[:length].numpy().tobytes() in whole
            assert (mel[length:] == config.data.pad_value).all()
