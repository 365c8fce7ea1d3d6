"""embed of recordings by several models, against each model alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from saved_models import make_checkpoint

from shardprep_trainer import SpeakerModel, embed
from shardprep_trainer.checkpoint.files import CheckpointFolder, load
from shardprep_trainer.checkpoint.model_folder import WEIGHTS


@pytest.fixture
def other(run: Path, make_config: Callable[..., object], tmp_path: Path) -> Path:
    """A model folder of another width, for the same features."""
    config = make_config(**{"model.dim": 16, "model.ff_dim": 32, "model.head_dim": 8})
    first = load(run / "model" / WEIGHTS)
    checkpoint = make_checkpoint(config, 7, features=first.features, dtype=first.dtype)
    CheckpointFolder(tmp_path / "other").save_best(checkpoint)
    return tmp_path / "other" / "model"


def run_embed(*words: object) -> Result:
    return CliRunner().invoke(embed.main, [*map(str, words)])


def test_recordings_get_the_joined_embeddings_of_all_models_among_the_arguments(
    run: Path, other: Path, audio: Path, tmp_path: Path
) -> None:
    paths = [audio / "s0" / "3.wav", audio / "s1" / "1.flac", audio / "s2" / "2.wav"]
    result = run_embed(run, paths[0], other, *paths[1:], "--out", tmp_path / "x.npz")
    assert result.exit_code == 0, result.output
    with np.load(tmp_path / "x.npz", allow_pickle=False) as file:
        found = {name: file[name] for name in file.files}
    assert found["paths"].tolist() == [str(path) for path in paths]
    assert found["checkpoint"].tolist() == [str(other / WEIGHTS), str(run / "model" / WEIGHTS)]
    assert (found["step"].tolist(), found["widths"].tolist()) == ([7, 5], [16, 32])
    cosines = []
    for place in (run, other):
        rows = SpeakerModel.from_pretrained(place).embed_audio(paths).astype(np.float64)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        cosines.append(rows @ rows.T)
    rows = found["embeddings"]
    assert np.allclose(rows @ rows.T, np.mean(cosines, axis=0), atol=1e-5)


def test_a_faulty_recording_is_left_out_for_all_models(
    run: Path, other: Path, audio: Path, tmp_path: Path
) -> None:
    (audio / "s0" / "1.wav").write_bytes(b"RIFF")
    words = (run, other, audio / "s0", "--out", tmp_path / "x.npz")
    assert run_embed(*words).exit_code == 1
    result = run_embed(*words, "--on-error", "skip")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("1.wav") == 1
    with np.load(tmp_path / "x.npz") as file:
        assert file["keys"].tolist() == ["0", "3"]
        assert file["embeddings"].shape == (2, 48)


def test_a_folder_that_is_both_is_an_error(
    run: Path, other: Path, audio: Path, tmp_path: Path
) -> None:
    recording = audio / "s0" / "3.wav"
    recording.rename(other / "3.wav")
    result = run_embed(run, other, audio, "--out", tmp_path / "x.npz")
    assert result.exit_code == 2
    assert f"{other}: holds a model and recordings, such as 3.wav" in result.stderr
    # The file of the model can mean nothing else.
    assert run_embed(run, other / WEIGHTS, audio, "--out", tmp_path / "x.npz").exit_code == 0
    result = run_embed(run, run, audio, "--out", tmp_path / "x.npz")
    assert (result.exit_code, "named twice" in result.stderr) == (2, True)
