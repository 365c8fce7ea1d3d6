"""`shardprep export` writes a file that says what it is, or an error and no file."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from click.testing import CliRunner, Result
from exported_files import padded, run_file, utterances
from oracle import model_of
from saved_models import BEST, make_checkpoint
from torch import Tensor, nn

from shardprep import FeatureRecipe
from shardprep_trainer import convert
from shardprep_trainer.checkpoint.files import CheckpointFolder
from shardprep_trainer.config.command_line import RECIPES
from shardprep_trainer.config.fields import Config
from shardprep_trainer.config.scoring import Calibration, Thresholds
from shardprep_trainer.convert import FORMATS
from shardprep_trainer.errors import ConfigError
from shardprep_trainer.export import choose_format, main

# Names that a careless encoding would lose, not in alphabetical order.
NAMES = ["id00002", 'Zoë, "Z"', "張三"]
RECIPE = FeatureRecipe(hop_length=200)
KNOWN = {
    "features": RECIPE.to_features(),
    "dtype": "float32",
    "thresholds": Thresholds(eer=0.5, min_dcf=0.75),
    "calibration": Calibration(scale=10.0, offset=-5.0),
}
ABOUT = (
    *("format_version", "speakers", "n_mels", "pad_value", "step", "features", "dtype"),
    *("longest_frames", "thresholds", "calibration"),
)

# PyTorch deprecates what opens a TorchScript file, but has nothing else that does.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@pytest.fixture
def run(make_config: Callable[..., Config], tmp_path: Path) -> Path:
    """A run folder with a best and a last checkpoint of different random weights."""
    config, folder = make_config(**{"data.pad_value": -19.5}), CheckpointFolder(tmp_path / "run")
    folder.save_best(make_checkpoint(config, 5, speakers=NAMES, **KNOWN))
    folder.save(make_checkpoint(config, 9, speakers=NAMES))
    return tmp_path / "run"


def run_export(run: Path, out: Path, *options: str) -> Result:
    return CliRunner().invoke(main, [str(run), "--out", str(out), *options])


def metadata_of(form: str, data: bytes) -> dict[str, str]:
    if form == "onnx":
        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        return dict(session.get_modelmeta().custom_metadata_map)
    extra = dict.fromkeys(ABOUT, "")
    torch.jit.load(io.BytesIO(data), _extra_files=extra)
    return {key: value.decode() for key, value in extra.items()}  # type: ignore[attr-defined]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("choice", "step"), [("best", 5), pytest.param("last", 9, marks=pytest.mark.slow)]
)
def test_the_command_writes_the_chosen_model_and_what_it_means(
    run: Path, tmp_path: Path, form: str, choice: str, step: int
) -> None:
    out = tmp_path / "out" / ("model.onnx" if form == "onnx" else "model.pt")
    result = run_export(run, out, "--checkpoint", choice)
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    data = out.read_bytes()
    assert metadata_of(form, data) == {
        "format_version": "1",
        "speakers": json.dumps(NAMES, ensure_ascii=False),
        "n_mels": "40",
        "pad_value": "-19.5",
        "step": str(step),
        "features": json.dumps(RECIPE.to_features() if choice == "best" else None),
        "dtype": "float32" if choice == "best" else "float16",
        "longest_frames": "8192",
        "thresholds": '{"eer":0.5,"min_dcf":0.75}' if choice == "best" else "null",
        "calibration": '{"scale":10.0,"offset":-5.0}' if choice == "best" else "null",
    }
    file = run / (BEST if choice == "best" else "checkpoints/step-00000009.pt")
    model = model_of(file)
    mel, lengths = padded(utterances(77, 12))
    with torch.no_grad():
        expected = model(mel, lengths)
    torch.testing.assert_close(run_file(form, data, mel, lengths)[1], expected, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_a_trained_run_can_be_exported_from_a_shell(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    from shardprep_trainer.train import main as train

    config = make_config()
    argv = ["--config", str(RECIPES / "smoke.yaml"), f"--data.shards={config.data.shards}"]
    argv += [f"--train.runs={tmp_path / 'runs'}", "--train.total_steps=4", "--train.valid_steps=4"]
    argv += ["--train.save_steps=4", "--data.batch_size=4", "--train.trackers=[]", "--name=tiny"]
    assert train(argv) in (0, None)
    out = tmp_path / "model.onnx"
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "shardprep_trainer.export",
        str(tmp_path / "runs/tiny"),
    ]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert len(done.stderr.splitlines()) == 2
    assert metadata_of("onnx", out.read_bytes())["step"] == "4"


class Perturbed(nn.Module):
    """The traceable model with a little added where utterances are longer than 1,000 frames."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, mel: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        embedding, logits = self.inner(mel, lengths)
        return embedding, logits + 0.0173 * (lengths > 1000).unsqueeze(1).to(logits.dtype)


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_that_deviates_is_not_written(
    run: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    traceable = convert.Traceable
    monkeypatch.setattr(convert, "Traceable", lambda model: Perturbed(traceable(model)).eval())
    folder = tmp_path / "out"
    folder.mkdir()
    result = run_export(run, folder / "model", "--format", form)
    assert result.exit_code == 1
    assert "error: the exported file deviates from the model by up to 0.0173" in result.stderr
    assert "in logits of" in result.stderr
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_named_with_its_remedy(
    run: Path, tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    result = run_export(run, tmp_path / "model.onnx")
    assert result.exit_code == 1
    assert package in result.stderr
    assert "pip install 'shardprep[export]'" in result.stderr
    assert not (tmp_path / "model.onnx").exists()


def test_torchscript_needs_none_of_them(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        monkeypatch.setitem(sys.modules, package, None)
    assert run_export(run, tmp_path / "model.pt").exit_code == 0


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("model.onnx", None, "onnx"),
        ("MODEL.ONNX", None, "onnx"),
        ("model.pt", None, "torchscript"),
        ("model.v2", "onnx", "onnx"),
        ("model", "torchscript", "torchscript"),
        ("model.pt", "torchscript", "torchscript"),
    ],
)
def test_the_ending_or_the_option_tells_the_format(
    name: str, given: str | None, expected: str
) -> None:
    assert choose_format(Path(name), given) == expected


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("model.bin", None, r"model\.bin: no format has the ending '\.bin'; name it \.onnx or"),
        ("model", None, r"add --format onnx or torchscript"),
        ("model.pt", "onnx", "ending is that of torchscript, but --format says onnx"),
        ("model.onnx", "torchscript", "ending is that of onnx, but --format says torchscript"),
    ],
)
def test_a_format_that_cannot_be_told_is_refused(
    name: str, given: str | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_format(Path(name), given)


@pytest.mark.parametrize(
    ("options", "code", "part"),
    [
        (["--out", "model.bin"], 2, "no format has the ending"),
        (["--out", "model.onnx", "--format", "tflite"], 2, "tflite"),
        (["--out", "model.pt", "--checkpoint", "nowhere.pt"], 1, "there is no such checkpoint"),
        ([], 2, "--out"),
    ],
)
def test_what_cannot_be_done_has_one_message_and_its_code(
    run: Path, options: list[str], code: int, part: str
) -> None:
    result = CliRunner().invoke(main, [str(run), *options])
    assert (result.exit_code, result.stdout) == (code, "")
    assert part in result.stderr
    assert "Traceback" not in result.stderr


def test_a_checkpoint_is_never_overwritten(run: Path) -> None:
    for file in (run / BEST, *sorted((run / "checkpoints").iterdir())):
        before = file.read_bytes()
        result = run_export(run, file, "--format", "torchscript")
        assert (result.exit_code, "is a checkpoint" in result.stderr) == (2, True)
        assert file.read_bytes() == before
