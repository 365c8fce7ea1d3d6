"""An exported file computes what its model does, says what it is, and exists only if it does."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner, Result
from oracle import model_of
from saved_models import BEST, make_checkpoint
from shardprep_trainer import export
from shardprep_trainer.checkpoint.files import CheckpointFolder
from shardprep_trainer.config.command_line import RECIPES, parse_args
from shardprep_trainer.config.fields import Config
from shardprep_trainer.errors import ConfigError, ExportError, TrainerError
from shardprep_trainer.export import choose_format, export_model, main
from shardprep_trainer.model.build import build_model
from shardprep_trainer.model.model import SpeakerModel
from torch import Tensor, nn

# Names that a careless encoding would lose, not in alphabetical order.
NAMES = ["id00002", 'Zoë, "Z"', "張三"]
TINY = {"conformer": {"dim": 16, "heads": 2, "head_dim": 8, "ff_dim": 32, "kernel_size": 7}}
TINY["transformer"] = {"dim": 16, "heads": 2, "head_dim": 8, "ff_dim": 24}
FORMATS = ("onnx", "torchscript")

# PyTorch deprecates what opens a TorchScript file, but has nothing else that does.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def recipe_model(recipe: str, **changes: Any) -> SpeakerModel:
    """The model of a recipe, narrow, with weights and running statistics of no special value."""
    settings = parse_args(["--config", str(RECIPES / f"{recipe}.yaml")]).config.model
    options = {f"--model.{k}={v}" for k, v in {**TINY[settings.encoder], **changes}.items()}
    config = parse_args(["--config", str(RECIPES / f"{recipe}.yaml"), *sorted(options)]).config
    torch.manual_seed(1)
    model = build_model(config.model, 40, len(NAMES))
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                noise = torch.rand_like(value) if "var" in name else torch.randn_like(value) * 0.1
                value += noise
    return model.eval()


def run_file(form: str, data: bytes, mel: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """What a stranger would write to run the file, without a line of ours."""
    if form == "torchscript":
        module = torch.jit.load(io.BytesIO(data))
        with torch.no_grad():
            embedding, logits = module(mel, lengths)
        return embedding, logits
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    outputs = session.run(["embedding", "logits"], {"mel": mel.numpy(), "lengths": lengths.numpy()})
    return torch.from_numpy(outputs[0]), torch.from_numpy(outputs[1])


def utterances(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randn(length, 40, generator=generator) * 3 - 8 for length in lengths]


def padded(parts: list[Tensor], extra: int = 0, value: float = -20.0) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(part) for part in parts])
    mel = torch.full((len(parts), int(lengths.max()) + extra, 40), value)
    for row, part in zip(mel, parts, strict=True):
        row[: len(part)] = part
    return mel, lengths


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("recipe", ["simple", "medium", "strong", "boss", "best"])
def test_a_file_of_every_recipe_gives_the_models_results_at_any_size(
    recipe: str, form: str
) -> None:
    model = recipe_model(recipe)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data, deviation = export_model(model, form, {"n_mels": "40"})
    assert deviation <= 1e-4
    # No size here is one that the export traced or checked by itself.
    for lengths in ((1,), (2,), (1, 1, 1), (513,), (130, 17, 64, 1, 99), (1201, 300), (31,) * 7):
        alone = utterances(*lengths)
        with torch.no_grad():
            embeddings = torch.cat([model.embed(part[None]) for part in alone])
            logits = torch.cat([model(part[None]) for part in alone])
        for mel, valid in (padded(alone), padded(alone, extra=9, value=torch.nan)):
            found = run_file(form, data, mel, valid)
            torch.testing.assert_close(found[0], embeddings, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(found[1], logits, atol=1e-4, rtol=1e-4)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_an_onnx_file_is_valid_whole_and_says_what_its_axes_are() -> None:
    data, _ = export_model(recipe_model("boss"), "onnx", {"n_mels": "40"})
    proto = onnx.load_from_string(data)
    onnx.checker.check_model(proto, full_check=True)
    assert not any(part.external_data for part in proto.graph.initializer)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 18)]
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    described = [(p.name, p.type, p.shape) for p in (*session.get_inputs(), *session.get_outputs())]
    assert described == [
        ("mel", "tensor(float)", ["B", "T", 40]),
        ("lengths", "tensor(int64)", ["B"]),
        ("embedding", "tensor(float)", ["B", 16]),
        ("logits", "tensor(float)", ["B", 3]),
    ]
    # A file does not tell where it was made.
    assert str(Path(export.__file__).parent).encode() not in data


@pytest.fixture
def run(make_config: Callable[..., Config], tmp_path: Path) -> Path:
    """A run folder with a best and a last checkpoint of different random weights."""
    config, folder = make_config(**{"data.pad_value": -19.5}), CheckpointFolder(tmp_path / "run")
    folder.save_best(make_checkpoint(config, 5, speakers=NAMES))
    folder.save(make_checkpoint(config, 9, speakers=NAMES))
    return tmp_path / "run"


def run_export(run: Path, out: Path, *options: str) -> Result:
    return CliRunner().invoke(main, [str(run), "--out", str(out), *options])


def metadata_of(form: str, data: bytes) -> dict[str, str]:
    if form == "onnx":
        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        return dict(session.get_modelmeta().custom_metadata_map)
    extra = dict.fromkeys(("format_version", "speakers", "n_mels", "pad_value", "step"), "")
    torch.jit.load(io.BytesIO(data), _extra_files=extra)
    return {key: value.decode() for key, value in extra.items()}  # type: ignore[attr-defined]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("choice", "step"), [("best", 5), ("last", 9)])
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
    }
    file = run / (BEST if choice == "best" else "checkpoints/step-00000009.pt")
    model = model_of(file)
    mel, lengths = padded(utterances(77, 12))
    with torch.no_grad():
        expected = model(mel, lengths)
    torch.testing.assert_close(run_file(form, data, mel, lengths)[1], expected, atol=1e-4, rtol=0)


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
    traceable = export.Traceable
    monkeypatch.setattr(export, "Traceable", lambda model: Perturbed(traceable(model)).eval())
    folder = tmp_path / "out"
    folder.mkdir()
    result = run_export(run, folder / "model", "--format", form)
    assert result.exit_code == 1
    assert "error: the exported file deviates from the model by up to 0.0173" in result.stderr
    assert "in logits of" in result.stderr
    assert list(folder.iterdir()) == []


def test_the_largest_deviation_counts_and_not_a_number_is_the_largest() -> None:
    model = recipe_model("simple")

    def off_by(early: float, late: float) -> export.Run:
        def run(mel: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                shift = late if mel.shape[1] > 1000 else early
                return model.embed(mel, lengths) + shift, model(mel, lengths)

        return run

    assert export.check_parity(model, off_by(0.0, 0.0), 40) == 0.0
    assert 0 < export.check_parity(model, off_by(5e-5, 1e-5), 40) <= 1e-4
    with pytest.raises(
        ExportError, match=r"up to 0\.[1-5]\d*, in embedding of \d x 1[13]00"
    ) as failed:
        export.check_parity(model, off_by(0.01, 0.5), 40)
    assert issubclass(ExportError, TrainerError)
    assert failed.value.exit_code == 1
    for wrong in (torch.nan, torch.inf):
        with pytest.raises(ExportError, match="up to inf, in embedding"):
            export.check_parity(model, off_by(0.0, wrong), 40)
    with pytest.raises(ExportError, match="up to inf"):
        export.check_parity(model, lambda m, n: (model.embed(m, n)[:1], model(m, n)[:1]), 40)


@pytest.mark.parametrize("form", FORMATS)
def test_a_model_that_a_trace_cannot_hold_is_refused(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fixed(Perturbed):
        def forward(self, mel: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
            return self.inner(mel.reshape(3, 48, 40), lengths)  # type: ignore[no-any-return]

    traceable = export.Traceable
    monkeypatch.setattr(export, "Traceable", lambda model: Fixed(traceable(model)).eval())
    with pytest.raises(ExportError, match=f"cannot be exported as {form} \\(.*nothing was written"):
        export_model(recipe_model("simple"), form, {"n_mels": "40"})


def test_weights_beyond_the_limit_of_one_file_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "ONNX_LIMIT", 1000)
    with pytest.raises(ExportError, match="one ONNX file holds 1,000; take --format torchscript"):
        export_model(recipe_model("simple"), "onnx", {"n_mels": "40"})


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
