"""What a run goes on from: its own checkpoints, and nobody else's unless told to."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
from shardprep_trainer.checkpoint.files import CheckpointFolder
from shardprep_trainer.checkpoint.state import RESUMED
from shardprep_trainer.config.fields import Config
from shardprep_trainer.errors import CheckpointError, ConfigError
from shardprep_trainer.run.start import choose_checkpoint

ConfigFactory = Callable[..., Config]


def test_the_best_weights_alone_are_nothing_to_resume_from(make_config: ConfigFactory) -> None:
    config = make_config()
    folder = CheckpointFolder(config.run)
    best = folder.save_best({"step": 6, "model": {}, "config": {}, "speakers": [], "n_mels": 40})
    shutil.copy(best, folder.folder / "step-00000006.pt")
    with pytest.raises(CheckpointError, match=r"step-00000006\.pt: holds no .*optimizer"):
        choose_checkpoint(folder, config, resume=True)


def test_a_restarted_run_goes_on_from_its_own_checkpoints_only(make_config: ConfigFactory) -> None:
    config = make_config()
    folder = CheckpointFolder(config.run)
    assert choose_checkpoint(folder, config, resume=False, launchers=["a"]) is None
    weights = {"step": 6, "speakers": ["a"], "n_mels": 40, "model": {}, "config": config.to_dict()}
    state = {**dict.fromkeys(RESUMED), **weights, "launchers": ["a", "b"]}
    file = folder.save(state, 6)
    # One machine of several is enough: the others may have come later.
    found = choose_checkpoint(folder, config, resume=False, launchers=["b", "c"])
    assert found is not None
    assert (found.file, found.state["step"]) == (file, 6)
    # Of another launch, which was not to be continued.
    for launchers in (["c"], []):
        with pytest.raises(ConfigError, match="already has checkpoints"):
            choose_checkpoint(folder, config, resume=False, launchers=launchers)


@pytest.mark.parametrize("bears", [None, "a", [["a"]], {"a": 1}, 3])
def test_a_checkpoint_that_bears_no_launchers_is_not_one_s_own(
    bears: object, make_config: ConfigFactory
) -> None:
    config = make_config()
    folder = CheckpointFolder(config.run)
    weights = {"step": 6, "speakers": ["a"], "n_mels": 40, "model": {}, "config": config.to_dict()}
    folder.save({**dict.fromkeys(RESUMED), **weights, "launchers": bears}, 6)
    with pytest.raises(ConfigError, match="already has checkpoints"):
        choose_checkpoint(folder, config, resume=False, launchers=["a"])
    assert choose_checkpoint(folder, config, resume=True) is not None
