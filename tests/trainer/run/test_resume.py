"""The checkpoint a run continues from: its own, and no other unless told to; the same run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from saved_models import make_checkpoint, make_training

from shardprep_trainer.checkpoint.files import CheckpointFolder
from shardprep_trainer.config.fields import Config
from shardprep_trainer.errors import CheckpointError, ConfigError
from shardprep_trainer.run.resume import check_same_run, choose_checkpoint

ConfigFactory = Callable[..., Config]
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


def test_a_model_alone_is_nothing_to_resume_from(make_config: ConfigFactory) -> None:
    config = make_config()
    folder = CheckpointFolder(config.run)
    folder.save_best(make_checkpoint(config, 6))
    with pytest.raises(CheckpointError, match="no checkpoint to resume from"):
        choose_checkpoint(folder, config, resume=True)
    folder.save(make_checkpoint(config, 6))
    with pytest.raises(CheckpointError, match=r"step-00000006\.pt: holds a model alone"):
        choose_checkpoint(folder, config, resume=True)


def test_a_restarted_run_continues_from_its_own_checkpoints_only(
    make_config: ConfigFactory,
) -> None:
    config = make_config()
    folder = CheckpointFolder(config.run)
    assert choose_checkpoint(folder, config, resume=False, launchers=["a"]) is None
    training = make_training(launchers=["a", "b"])
    file = folder.save(make_checkpoint(config, 6, training=training))
    # One machine of several is enough: the others may have come later.
    found = choose_checkpoint(folder, config, resume=False, launchers=["b", "c"])
    assert found is not None
    assert (found.checkpoint.file, found.checkpoint.step) == (file, 6)
    # Of another launch, which was not to be continued.
    for launchers in (["c"], []):
        with pytest.raises(ConfigError, match="already has checkpoints"):
            choose_checkpoint(folder, config, resume=False, launchers=launchers)


def test_a_checkpoint_without_launchers_is_not_one_s_own(make_config: ConfigFactory) -> None:
    config = make_config()
    folder = CheckpointFolder(config.run)
    folder.save(make_checkpoint(config, 6, training=make_training()))
    with pytest.raises(ConfigError, match="already has checkpoints"):
        choose_checkpoint(folder, config, resume=False, launchers=["a"])
    assert choose_checkpoint(folder, config, resume=True) is not None


@pytest.mark.parametrize("launchers", [None, "a", [["a"]], {"a": 1}, 3])
def test_launchers_of_another_kind_are_refused_by_file(
    launchers: object, make_config: ConfigFactory
) -> None:
    config = make_config()
    folder = CheckpointFolder(config.run)
    folder.save(make_checkpoint(config, 6, training=make_training(launchers=launchers)))
    with pytest.raises(CheckpointError, match=r"step-00000006\.pt: .*training\.launchers"):
        choose_checkpoint(folder, config, resume=False, launchers=["a"])
