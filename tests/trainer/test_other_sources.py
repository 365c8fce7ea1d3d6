"""Sets of other features than the homework's train and predict."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import shardprep
from shardprep_trainer.predict import main
from shardprep_trainer.run.start import prepare
from shardprep_trainer.run.trainer import Trainer

N_MELS = 80


def utterances() -> Iterator[tuple[str, str, np.ndarray, str]]:
    """Key, speaker, matrix and split of 20 utterances of two speakers who differ in level."""
    rng = np.random.default_rng(0)
    for number in range(20):
        mel = rng.normal(-4 if number % 2 else 4, 1, (40 + number, N_MELS)).astype(np.float32)
        split = "test" if number > 17 else "val" if number > 13 else ""
        yield f"clip/{number:02d}", f"spk{number % 2}", mel, split


def from_a_program(folder: Path) -> Path:
    with shardprep.ShardWriter(folder / "s", N_MELS, dtype="float32", workers=1) as writer:
        for key, speaker, mel, split in utterances():
            writer.add(key, mel, speaker, split or None)  # type: ignore[arg-type]
    return folder / "s"


def from_a_list(folder: Path) -> Path:
    (folder / "clip").mkdir()
    lines = ["path,speaker,split"]
    for key, speaker, mel, split in utterances():
        np.save(folder / f"{key}.npy", mel)
        lines.append(f"{key}.npy,{speaker},{split if split != 'test' else 'train'}")
    (folder / "list.csv").write_text("\n".join(lines))
    options = shardprep.BuildOptions(dtype="float32", workers=1)
    shardprep.build_shards(folder / "list.csv", folder / "s", options)
    return folder / "s"


@pytest.mark.parametrize("make", [from_a_program, from_a_list])
def test_it_trains_and_predicts(
    make: Callable[[Path], Path], make_config: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    shards = make(tmp_path / "other")
    config = make_config(**{"data.shards": shards, "train.total_steps": 6, "optim.lr": 0.01})
    trainer = Trainer(prepare(config))
    trainer.fit()
    trainer.close()
    out = tmp_path / "out.csv"

    def predict(*options: str) -> Any:
        arguments = [str(config.run), "--shards", str(shards), "--out", str(out), *options]
        return CliRunner().invoke(main, arguments)

    if make is from_a_list:
        refused = predict()
        assert refused.exit_code == 1
        assert "has no split test, only train, val; --split val names one" in refused.stderr
        done = predict("--split", "val")
        assert "accuracy on val" in done.stdout
    else:
        done = predict("--ids", "key")
        assert out.read_text().splitlines()[1].startswith("clip/18,spk")
        truth = tmp_path / "truth.csv"
        truth.write_text("Id,Category\nclip/18.pt,spk0\nclip/19,spk1\n")
        scored = predict("--ids", "key", "--labels", str(truth))
        assert f"accuracy on {truth}" in scored.stdout
        done = predict()
        assert out.read_text().splitlines()[1].startswith("clip/18.pt,spk")
    assert done.exit_code == 0, done.output
