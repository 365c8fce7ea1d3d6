"""Embeddings on disk: the split's own order, no pickle, a complete file or none."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from oracle import model_of
from saved_models import BEST, change_best

import shardprep
from shardprep_trainer.checkpoint.files import load
from shardprep_trainer.embed import main
from shardprep_trainer.evaluation.views import Views


def embed(run: Path, *options: object) -> Result:
    return CliRunner().invoke(main, [str(run), *map(str, options)])


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("segments", [0, 2])
def test_a_file_holds_what_each_utterance_gives_alone(
    run: Path, shards: Path, tmp_path: Path, split: str, segments: int
) -> None:
    out = tmp_path / "new" / "embeddings.npz"
    options = ("--split", split, "--out", out, "--tta", segments, "--max-frames", 400)
    result = embed(run, *options, "--checkpoint", "last")
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    data = shardprep.open_shards(shards)
    model = model_of(run / "checkpoints" / "step-00000009.pt")
    part, views = data[split], Views(model, segments, 64)
    with np.load(out, allow_pickle=False) as file:
        found = {name: file[name] for name in file.files}
    assert found["embeddings"].dtype == np.float32
    assert found["keys"].tolist() == part.keys.tolist()
    assert found["labels"].tolist() == part.labels.tolist()
    assert tuple(found["speakers"]) == data.speakers
    assert found["checkpoint"] == str(run / "checkpoints" / "step-00000009.pt")
    assert (found["step"], found["split"], found["tta"]) == (9, split, segments)
    assert found["fingerprint"] == data.manifest.fingerprint
    # The segments of the run's training are the default.
    assert found["tta_frames"] == (64 if segments else 0)
    with torch.no_grad():
        for index, row in enumerate(found["embeddings"]):
            mel = torch.from_numpy(part.read(index)).float()[None]
            assert np.allclose(row, views.embed_and_score(mel)[0][0].numpy(), atol=1e-5)


def test_a_failed_write_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()

    def fail(source: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    result = embed(run, "--out", tmp_path / "out" / "embeddings.npz")
    assert result.exit_code == shardprep.StorageError.exit_code
    assert "No space left" in result.stderr
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("options", "code", "part"),
    [
        (["--split", "dev"], 1, "has no split dev, only train, val, test"),
        (["--tta", "-1"], 2, "tta"),
        (["--checkpoint", "nowhere.pt"], 1, "nowhere.pt: there is no such checkpoint"),
    ],
)
def test_what_cannot_be_done_has_one_message_and_its_code(
    run: Path, tmp_path: Path, options: list[str], code: int, part: str
) -> None:
    result = embed(run, "--out", tmp_path / "out.npz", *options)
    assert result.exit_code == code
    assert part in result.stderr
    assert not (tmp_path / "out.npz").exists()


def test_a_model_that_diverged_is_named(run: Path, tmp_path: Path) -> None:
    weights = load(run / BEST).weights
    diverged = torch.full_like(weights["encoder.stem.weight"], torch.nan)
    file = change_best(run, weights={**weights, "encoder.stem.weight": diverged})
    result = embed(run, "--out", tmp_path / "out.npz")
    assert result.exit_code == 1
    assert f"{file}: the embeddings of 6 utterances of val are not finite" in result.stderr
    assert not (tmp_path / "out.npz").exists()


def test_a_name_that_is_neither_model_nor_recording_is_told_before_all_else(
    run: Path, tmp_path: Path
) -> None:
    # Nothing is known of this run's features either.
    result = embed(run, tmp_path / "runs" / "misspelt", "--out", tmp_path / "x.npz")
    assert result.exit_code == 1
    assert "misspelt: there is no such recording" in result.stderr
