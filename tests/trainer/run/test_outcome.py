"""The end of a run names the command that continues it, with the same launch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from new_speakers import write_set

from shardprep_trainer.config.fields import Config
from shardprep_trainer.run.outcome import Outcome, summary
from shardprep_trainer.train import main

ConfigFactory = Callable[..., Config]


@pytest.mark.parametrize(
    ("machines", "part"),
    [
        ("1", "continue with: accelerate launch --num_processes 1 --cpu "),
        ("2", "continue with: the same launch on every machine, with these options after "),
    ],
)
def test_a_run_of_several_machines_is_continued_on_all_of_them(
    machines: str,
    part: str,
    make_config: ConfigFactory,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = make_config(**{"train.stop_step": 2, "data.global_batch": 8})
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    # As torchrun tells its workers.
    monkeypatch.setenv("GROUP_WORLD_SIZE", machines)
    assert main(["--config", str(tmp_path / "run.yaml")]) == 0
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(part)
    assert last.endswith(f"--config {config.run / 'config.yaml'} --resume")


@pytest.mark.parametrize(("test", "command"), [(True, "predict"), (False, "score")])
def test_the_next_command_is_one_that_the_splits_allow(
    test: bool, command: str, make_config: ConfigFactory
) -> None:
    done = Outcome(step=12, finished=True, signal=0, best_accuracy=0.5, best_step=6)
    text = summary(make_config(), done, processes=1, device="cpu", precision="no", test=test)
    last = text.splitlines()[-1]
    assert last.startswith(f"next: shardprep {command} ")
    assert ("--out" in last) is test


def test_a_run_on_a_set_without_test_ends_well_and_says_what_is_best(
    make_config: ConfigFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(**{"data.shards": write_set(tmp_path / "mixed")})
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    assert main(["--config", str(tmp_path / "run.yaml")]) == 0
    *_, best, last = capsys.readouterr().err.splitlines()
    assert best.startswith("best equal error rate of new speakers ")
    assert last.startswith("next: shardprep score ")
