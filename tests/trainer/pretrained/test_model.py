"""A model as one object: equal embeddings on every way, decisions by their formulas, files."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner
from exported_files import run_file
from oracle import model_of
from saved_models import BEST
from spoken import LONGEST, RATE, voice

import shardprep
import shardprep_trainer
from shardprep_trainer import SpeakerModel
from shardprep_trainer.checkpoint.files import load
from shardprep_trainer.embed import main as embed
from shardprep_trainer.errors import CheckpointError, PredictionError
from shardprep_trainer.export import describe
from shardprep_trainer.export import main as export
from shardprep_trainer.pretrained import model as model_module
from shardprep_trainer.pretrained.batches import batches
from tests.shardprep.conftest import as_read

# Of TorchScript.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def embedded(*arguments: object) -> dict[str, np.ndarray]:
    result = CliRunner().invoke(embed, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    with np.load(arguments[arguments.index("--out") + 1], allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def run_exported(form: str, data: bytes, mel: np.ndarray, longest: int) -> np.ndarray:
    """What a user of an exported file computes, by the documentation."""
    count = math.ceil(len(mel) / longest)
    total = np.zeros(1)
    for n in range(count):
        piece = mel[len(mel) * n // count : len(mel) * (n + 1) // count]
        own = run_file(form, data, torch.from_numpy(piece[None]), torch.tensor([len(piece)]))[
            0
        ].numpy()[0]
        total = total + (own if count == 1 else own / np.linalg.norm(own) * len(piece) / len(mel))
    return np.asarray(total)


def check_parity(run: Path, audio: Path, tmp_path: Path, form: str, longest: int) -> None:
    """Shards, command, Python and an exported file give equal embeddings."""
    by_shards = embedded(run, "--split", "train", "--out", tmp_path / "shards.npz")
    by_command = embedded(run, audio, "--out", tmp_path / "audio.npz")
    assert sorted(by_shards["keys"]) == sorted(by_command["keys"])
    of_shards = dict(zip(by_shards["keys"], by_shards["embeddings"], strict=True))
    model = SpeakerModel.from_pretrained(run)
    suffix = {"onnx": ".onnx", "torchscript": ".pt"}[form]
    out = tmp_path / f"model{suffix}"
    result = CliRunner().invoke(export, [str(run), "--out", str(out)])
    assert result.exit_code == 0, result.output
    paths = [Path(path) for path in by_command["paths"]]
    by_python = model.embed_audio(paths)
    for number, (key, path) in enumerate(zip(by_command["keys"], paths, strict=True)):
        expected = of_shards[key]
        mel = shardprep.audio_features(path, model.recipe, dtype=model.dtype).astype(np.float32)
        samples, rate = soundfile.read(path, dtype="float32")
        for found in (
            by_command["embeddings"][number],
            by_python[number],
            model.embed_audio(samples, rate),
            model.embed(mel),
            run_exported(form, out.read_bytes(), mel, longest),
        ):
            assert np.abs(found - expected).max() < 1e-4 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_shards_command_python_and_an_exported_file_agree(
    run: Path, audio: Path, tmp_path: Path, dtype: str
) -> None:
    assert SpeakerModel.from_pretrained(run).dtype == dtype
    # Of these, one is longer than LONGEST frames.
    check_parity(run, audio, tmp_path, "torchscript", LONGEST)


@pytest.mark.slow
def test_they_agree_on_minutes_of_speech_and_in_onnx(
    make_run: Callable[..., Path], audio: Path, shards: Path, tmp_path: Path
) -> None:
    for number, seconds in enumerate((60.0, 90.0)):
        soundfile.write(audio / "s0" / f"long{number}.wav", voice(seconds, 9 + number), RATE)
    options = shardprep.BuildOptions(val_fraction=0, workers=1, overwrite=True)
    shardprep.build_shards(audio, shards, options)
    assert shardprep.open_shards(shards)["train"].frames.max() > 8192
    check_parity(make_run(longest_frames=8192), audio, tmp_path, "onnx", 8192)


def test_the_stored_type_belongs_to_the_recipe(make_run: Callable[..., Path], audio: Path) -> None:
    path = audio / "s0" / "3.wav"
    found = {}
    for dtype in ("float16", "float32", "uint8"):
        model = SpeakerModel.from_pretrained(make_run(dtype=dtype))
        mel = shardprep.audio_features(path, model.recipe)
        oracle = model_of(model.checkpoint.file)
        with torch.no_grad():
            rounded = torch.from_numpy(as_read(mel, dtype).astype(np.float32))
            expected = oracle.embed(rounded[None])[0].numpy()
        found[dtype] = model.embed_audio(path)
        assert np.allclose(found[dtype], expected, atol=1e-5)
        assert np.allclose(model.embed(mel), expected, atol=1e-5)
    assert np.abs(found["float16"] - found["float32"]).max() > 1e-5
    assert np.abs(found["uint8"] - found["float32"]).max() > 1e-4


def test_batches_hold_every_mel_once_within_their_area() -> None:
    mels = [np.full((length, 2), length, np.float16) for length in (3, 40, 9, 10, 1, 100)]
    seen = []
    for own, mel, lengths in batches(mels, 40, -1.0):
        assert mel.dtype == torch.float32
        assert len(own) * mel.shape[1] <= 40 or len(own) == 1
        for number, row, length in zip(own, mel, lengths.tolist(), strict=True):
            seen.append(number)
            assert length == len(mels[number])
            assert (row[:length] == length).all()
            assert (row[length:] == -1).all()
    assert sorted(seen) == list(range(len(mels)))


def test_many_recordings_come_in_their_order_with_their_faults(
    run: Path, audio: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So small that the recordings are embedded in several goes.
    monkeypatch.setattr(model_module, "_WAITING", 150)
    model = SpeakerModel.from_pretrained(run)
    (audio / "empty.wav").write_bytes(b"")
    places = [audio / "s2" / "2.wav", audio / "empty.wav", audio / "s1" / "4.flac", audio / "no"]
    places += [audio / "s0" / "0.wav"]
    found = dict(model.use(places))
    assert list(found) == places
    for place, used in found.items():
        if place.name in ("empty.wav", "no"):
            assert isinstance(used, ValueError)
        else:
            assert not isinstance(used, ValueError)
            assert np.allclose(used.embedding, model.embed_audio(place), atol=1e-5)
            assert used.pieces == math.ceil(used.frames / LONGEST)
    with pytest.raises(PredictionError, match=r"empty\.wav: is empty"):
        model.embed_audio(places)
    with pytest.raises(PredictionError, match=r"no: cannot be read: No such file"):
        model.identify(audio / "no")


def test_to_compare_is_a_cosine_a_probability_and_a_decision(run: Path, audio: Path) -> None:
    model = SpeakerModel.from_pretrained(run)
    a, b = audio / "s0" / "3.wav", audio / "s2" / "2.wav"
    first, second = (model.embed_audio(path).astype(np.float64) for path in (a, b))
    cosine = float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))
    found = model.compare(a, b, prior=0.1)
    assert found.cosine == pytest.approx(cosine, abs=1e-5)
    odds = math.exp(8 * cosine - 2) * 0.1 / 0.9
    assert found.probability == pytest.approx(odds / (1 + odds), abs=1e-4)
    assert found.same == (cosine >= 0.25)
    assert model.compare(a, a).same
    assert model.compare_embeddings(first, -first).same is False
    assert model.compare_embeddings(first, 0 * first).cosine == 0
    with pytest.raises(ValueError, match="prior is 1"):
        model.compare(a, b, prior=1)


def test_a_model_without_trials_decides_nothing(make_run: Callable[..., Path]) -> None:
    model = SpeakerModel.from_pretrained(make_run(thresholds=None, calibration=None))
    found = model.compare_embeddings(np.ones(3, np.float32), np.ones(3, np.float32))
    assert found == (pytest.approx(1), None, None)


def test_to_identify_is_to_rank_the_scores_of_the_head(run: Path, audio: Path) -> None:
    model = SpeakerModel.from_pretrained(run)
    path = audio / "s0" / "3.wav"
    mel = torch.from_numpy(model.features(path).astype(np.float32))
    with torch.no_grad():
        scores = model_of(model.checkpoint.file)(mel[None])[0]
    expected = [model.speakers[int(number)] for number in scores.argsort(descending=True)]
    found = model.identify(path, top=2)
    assert [match.speaker for match in found] == expected[:2]
    assert found[0].score == pytest.approx(float(scores.max()), abs=1e-5)
    assert [len(each) for each in model.identify([path, path])] == [3, 3]
    for top in (0, -1):
        with pytest.raises(ValueError, match=f"top is {top}, expected 1 or more"):
            model.identify(path, top=top)


def test_mels_may_be_tensors_of_any_kind(run: Path) -> None:
    model = SpeakerModel.from_pretrained(run)
    mel = torch.arange(200.0).reshape(5, 40).div(16).bfloat16()
    expected = model.embed(mel.float().numpy())
    for found in (mel, mel.float().requires_grad_()):
        np.testing.assert_array_equal(model.embed(found), expected)


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_what_is_no_mel_is_refused(run: Path, dtype: str) -> None:
    model = SpeakerModel.from_pretrained(run)
    for mel in (np.zeros((5, 39)), np.zeros((0, 40)), np.zeros(40), torch.zeros(1, 5, 40)):
        with pytest.raises(ValueError, match=r"expected \(frames, 40\)"):
            model.embed(mel)
    for value in (3e38, np.nan):
        with pytest.raises(ValueError, match=f"no finite numbers of {dtype}"):
            model.embed(np.full((5, 40), value))
    with pytest.raises(ValueError, match="found no recording"):
        model.embed([])


def test_a_model_that_knows_no_recipe_takes_one(make_run: Callable[..., Path], audio: Path) -> None:
    path = audio / "s0" / "3.wav"
    with_features = SpeakerModel.from_pretrained(make_run()).embed_audio(path)
    run = make_run(features=None)
    with pytest.raises(shardprep.FormatError, match="nothing is known"):
        SpeakerModel.from_pretrained(run).embed_audio(path)
    recipe = shardprep.FeatureRecipe()
    found = SpeakerModel.from_pretrained(run, recipe=recipe).embed_audio(path)
    assert np.array_equal(found, with_features)
    other = SpeakerModel.from_pretrained(run, recipe=shardprep.FeatureRecipe(n_mels=80))
    with pytest.raises(shardprep.FormatError, match="80 mel bins"):
        other.embed_audio(path)


@pytest.mark.parametrize("form", ["run", "folder", "file"])
def test_a_model_is_opened_by_its_folder_its_run_and_its_file(run: Path, form: str) -> None:
    place = {"run": run, "folder": run / "model", "file": run / BEST}[form]
    assert SpeakerModel.from_pretrained(str(place)).checkpoint.file == run / BEST


def test_a_saved_model_is_the_same_model(run: Path, audio: Path, tmp_path: Path) -> None:
    model = SpeakerModel.from_pretrained(run)
    model.save_pretrained(tmp_path / "saved")
    again = SpeakerModel.from_pretrained(tmp_path / "saved")
    assert describe(again.checkpoint) == describe(model.checkpoint)
    path = audio / "s0" / "3.wav"
    assert np.array_equal(again.embed_audio(path), model.embed_audio(path))
    saved = tmp_path / "saved"
    config = json.loads((saved / "config.json").read_text())
    assert config["features"] == json.loads((run / "model" / "config.json").read_text())["features"]
    assert (saved / "README.md").exists()


class Hub:
    """What stands for the Hub: takes the calls up to the upload."""

    uploads: list[dict[str, Any]] = []

    def __init__(self, **_: object) -> None:
        pass

    def create_repo(self, repo_id: str, **_: object) -> Any:
        return type("Repo", (), {"repo_id": repo_id})

    def upload_folder(self, *, folder_path: Path, **options: Any) -> str:
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        self.uploads.append({**options, "files": files})
        return "a url"


def test_push_to_hub_uploads_the_model_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    monkeypatch.setattr(Hub, "uploads", [])
    SpeakerModel.from_pretrained(run).push_to_hub("ann/voices")
    (upload,) = Hub.uploads
    assert upload["repo_id"] == "ann/voices"
    names = {"model.safetensors", "config.json", "config.yaml", "README.md"}
    assert set(upload["files"]) == names
    (tmp_path / "model.safetensors").write_bytes(upload["files"]["model.safetensors"])
    assert load(tmp_path / "model.safetensors").step == 5


def test_a_name_of_the_hub_is_fetched_as_one_file(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(name: str, file: str, **options: object) -> str:
        asked.append((name, file, options["revision"]))
        return str(run / BEST)

    monkeypatch.setattr("shardprep_trainer.pretrained.hub.hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    model = SpeakerModel.from_pretrained("ann/voices", revision="v1")
    assert asked == [("ann/voices", "model.safetensors", "v1")]
    assert model.checkpoint.step == 5
    # A name that begins with a folder of this machine is a path.
    (tmp_path / "runs").mkdir()
    with pytest.raises(CheckpointError, match="the folder does not exist"):
        SpeakerModel.from_pretrained("runs/boss")


def test_without_a_network_an_unknown_name_is_the_machines_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(shardprep.StorageError, match="ann/voices: was not fetched"):
        SpeakerModel.from_pretrained("ann/voices", local_files_only=True, cache_dir=tmp_path)


def test_the_package_names_it_and_loads_it_only_when_asked() -> None:
    assert shardprep_trainer.__all__ == ["SpeakerModel", "check_encoder"]
    assert shardprep_trainer.SpeakerModel is model_module.SpeakerModel
    code = "import shardprep_trainer, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
