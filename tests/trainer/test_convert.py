"""A converted model computes what the model does, at any size, or conversion fails."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from exported_files import padded, run_file, utterances
from torch import Tensor, nn

from shardprep_trainer import convert
from shardprep_trainer.config.command_line import RECIPES, parse_args
from shardprep_trainer.convert import FORMATS, export_model
from shardprep_trainer.errors import ExportError, TrainerError
from shardprep_trainer.model.build import build_model
from shardprep_trainer.model.model import SpeakerNetwork

SPEAKERS = 3
TINY = {"conformer": {"dim": 16, "heads": 2, "head_dim": 8, "ff_dim": 32, "kernel_size": 7}}
TINY["transformer"] = {"dim": 16, "heads": 2, "head_dim": 8, "ff_dim": 24}

# PyTorch deprecates what opens a TorchScript file, but has nothing else that does.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

OTHER_RECIPES = ("simple", "medium", "strong", "mfa", "trunk", "best")


def recipe_model(recipe: str, **changes: Any) -> SpeakerNetwork:
    """The model of a recipe, narrow, with weights and running statistics of no special value."""
    settings = parse_args(["--config", str(RECIPES / f"{recipe}.yaml")]).config.model
    tiny = {**TINY.get(settings.encoder, {}), **changes}
    options = [f"--model.{name}={value}" for name, value in sorted(tiny.items())]
    config = parse_args(["--config", str(RECIPES / f"{recipe}.yaml"), *options]).config.model
    # An encoder that a recipe names by its class has sizes of its own.
    sizes = {"dim": 16, "layers": 2, "heads": 2}
    own = {name: sizes.get(name, value) for name, value in config.encoder_options.items()}
    if "channels" in own:
        own["channels"] = [8] * len(config.encoder_options["channels"])
    torch.manual_seed(1)
    model = build_model(replace(config, encoder_options=own), 40, SPEAKERS)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                noise = torch.rand_like(value) if "var" in name else torch.randn_like(value) * 0.1
                value += noise
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("recipe", ["boss", *OTHER_RECIPES])
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
    assert str(Path(convert.__file__).parent).encode() not in data


def test_the_largest_deviation_counts_and_not_a_number_is_the_largest() -> None:
    model = recipe_model("simple")

    def off_by(early: float, late: float) -> convert.Run:
        def run(mel: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                shift = late if mel.shape[1] > 1000 else early
                return model.embed(mel, lengths) + shift, model(mel, lengths)

        return run

    assert convert.check_parity(model, off_by(0.0, 0.0), 40) == 0.0
    assert 0 < convert.check_parity(model, off_by(5e-5, 1e-5), 40) <= 1e-4
    with pytest.raises(
        ExportError, match=r"up to 0\.[1-5]\d*, in embedding of \d x 1[13]00"
    ) as failed:
        convert.check_parity(model, off_by(0.01, 0.5), 40)
    assert issubclass(ExportError, TrainerError)
    assert failed.value.exit_code == 1
    for wrong in (torch.nan, torch.inf):
        with pytest.raises(ExportError, match="up to inf, in embedding"):
            convert.check_parity(model, off_by(0.0, wrong), 40)
    with pytest.raises(ExportError, match="up to inf"):
        convert.check_parity(model, lambda m, n: (model.embed(m, n)[:1], model(m, n)[:1]), 40)


@pytest.mark.parametrize("form", FORMATS)
def test_a_model_that_a_trace_cannot_hold_is_refused(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FixedSize(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, mel: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
            return self.inner(mel.reshape(3, 48, 40), lengths)  # type: ignore[no-any-return]

    traceable = convert.Traceable
    monkeypatch.setattr(convert, "Traceable", lambda model: FixedSize(traceable(model)).eval())
    with pytest.raises(ExportError, match=f"cannot be exported as {form} \\(.*nothing was written"):
        export_model(recipe_model("simple"), form, {"n_mels": "40"})


def test_weights_beyond_the_limit_of_one_file_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "ONNX_LIMIT", 1000)
    with pytest.raises(ExportError, match="one ONNX file holds 1,000; take --format torchscript"):
        export_model(recipe_model("simple"), "onnx", {"n_mels": "40"})
