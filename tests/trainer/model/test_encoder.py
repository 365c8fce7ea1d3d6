"""What an encoder of one's own must be, and what is said of one that is not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from own_encoder import Tdnn
from torch import Tensor, nn

import shardprep_trainer
from shardprep_trainer.config.fields import ModelConfig
from shardprep_trainer.errors import ConfigError, EncoderError
from shardprep_trainer.model.build import build_model
from shardprep_trainer.model.encoder.check import check_encoder
from shardprep_trainer.model.encoder.named import build_named
from shardprep_trainer.model.trunk import ResNet, ResNetConformer

TDNN = "own_encoder:Tdnn"
OURS: dict[str, dict[str, Any]] = {
    "conformer": {"ff_dim": 32, "kernel_size": 7, "concat": True, "stem_channels": 3},
    "transformer": {"ff_dim": 24, "subsampling": 2},
}


class Wrong(Tdnn):
    """A TDNN that breaks the contract in one way."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(40)
        self.spare: nn.Module | None = None
        for name, value in changes.items():
            setattr(self, name, value)

    def alter(self, out: Tensor, mel: Tensor, mask: Tensor | None) -> Tensor:
        return out

    def forward(self, mel: Tensor, mask: Tensor | None) -> Tensor:
        return self.alter(super().forward(mel, mask), mel, mask)


def zeroed(out: Tensor, mel: Tensor, mask: Tensor | None) -> Tensor:
    mel[:, 0] = 0.0
    return out


def nan_where_padded(out: Tensor, mel: Tensor, mask: Tensor | None) -> Tensor:
    return out if mask is None else out.masked_fill(~mask[:, ::2].unsqueeze(2), torch.nan)


# Each way of breaking the contract, and what is said of it.
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "no width": ({"width": None}, "its attribute width is nothing"),
    "a width of 0": ({"width": 0}, "its attribute width is 0"),
    "a text": ({"subsampling": "2"}, "its attribute subsampling is '2'"),
    "another width": ({"width": 25}, r"the shape of its output is \(2, 5, 24\)"),
    "another rate": ({"subsampling": 1}, r"the shape of its output is \(2, 5, 24\)"),
    "a pair": ({"alter": lambda out, mel, mask: (out, mask)}, "returned a tuple"),
    "whole numbers": ({"alter": lambda out, mel, mask: out.long()}, "torch.int64"),
    "not finite": ({"alter": nan_where_padded}, "its output is not finite"),
    "changes mel": ({"alter": zeroed}, "forward changes mel in place"),
    "fails": ({"alter": lambda out, mel, mask: out[10**6, 0]}, r"forward failed .*IndexError"),
    "needs two frames": (
        {"alter": lambda out, mel, mask: out if mel.shape[1] > 1 else out[:, :0]},
        r"the shape of its output is \(1, 0, 24\)",
    ),
    "mean over padding": (
        {"alter": lambda out, mel, mask: out - out.mean(1, keepdim=True)},
        "padding counts: an utterance of .* frames differs",
    ),
    "looks at others": (
        {"alter": lambda out, mel, mask: out - out[:, :1].mean(0, keepdim=True)},
        "padding counts: an utterance of 37 frames differs .* beside 1 others",
    ),
    "a weight is not used": ({"spare": nn.Linear(2, 2)}, "the weight spare.weight gets no grad"),
    "no gradient": ({"alter": lambda out, mel, mask: out.detach()}, "its output has no gradient"),
    "channels last": (
        {"spare": nn.Conv2d(2, 2, 3).to(memory_format=torch.channels_last)},  # type: ignore[call-overload]
        "the weight spare.weight is not contiguous",
    ),
    "cannot be copied": ({"lock": sys._getframe()}, "copy.deepcopy fails"),
}


@pytest.mark.parametrize("name", [*OURS, "trunk", "hybrid", TDNN])
def test_our_encoders_keep_the_contract(name: str) -> None:
    torch.manual_seed(0)
    if name == "trunk":
        check_encoder(ResNet(40, channels=(4, 6, 8, 8), images=["mel"]), 40)
    elif name == "hybrid":
        check_encoder(ResNetConformer(40, dim=16, layers=2, heads=2), 40)
    elif name == TDNN:
        check_encoder(Tdnn(40), 40)
    else:
        sizes = {"dim": 16, "layers": 2, "heads": 2, "head_dim": 8, **OURS[name]}
        check_encoder(build_model(ModelConfig(encoder=name, **sizes), 40, 3).encoder, 40)


@pytest.mark.parametrize("way", BROKEN)
def test_an_encoder_that_breaks_the_contract_is_told_which_part(way: str) -> None:
    changes, message = BROKEN[way]
    torch.manual_seed(0)
    with pytest.raises(EncoderError, match=message) as told:
        shardprep_trainer.check_encoder(Wrong(**changes), 40)
    assert "docs/training.md" in str(told.value)
    assert isinstance(told.value, ConfigError)


def test_what_is_no_module_is_no_encoder() -> None:
    with pytest.raises(EncoderError, match=r"found a list, allowed is a torch\.nn\.Module"):
        check_encoder([], 40)  # type: ignore[arg-type]


def test_a_check_leaves_the_encoder_as_it_was() -> None:
    encoder = Tdnn(40).train()
    encoder.norms[0].eval()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    state = torch.get_rng_state()
    check_encoder(encoder, 40)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert [layer.training for layer in encoder.norms] == [False, True]
    assert all(weight.grad is None for weight in encoder.parameters())


def test_the_weights_of_a_named_encoder_depend_on_the_seed_alone() -> None:
    config = ModelConfig(encoder=TDNN, encoder_options={"width": 6}, pooling="mean")
    torch.manual_seed(3)
    model = build_model(config, 40, 5, [TDNN])
    torch.manual_seed(3)
    encoder, head = Tdnn(40, width=6), torch.empty(5, 6)
    nn.init.xavier_uniform_(head)
    assert torch.equal(model.encoder.first.weight, encoder.first.weight)
    assert torch.equal(model.classifier.weight, head)


def write_module(folder: Path, name: str, text: str) -> str:
    (folder / f"{name}.py").write_text(text)
    return name


GOOD = "from own_encoder import Tdnn\n"
MODULES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    # Text of the module, attribute, options, what is said.
    "fails at once": ("1 / 0\n", "E", {}, "importing .* failed .ZeroDivisionError: division by"),
    "needs another": ("import no_such_package\n", "E", {}, "needs no_such_package, which is miss"),
    "lacks it": ("", "E", {}, "has no E"),
    "a function": ("def E(n_mels): return 1\n", "E", {}, "found function E, allowed is a class"),
    "another class": ("class E: pass\n", "E", {}, "found type E, allowed is a class"),
    "another option": (
        GOOD,
        "Tdnn",
        {"widht": 3},
        r"model.encoder_options: .*unexpected keyword argument 'widht'.*Tdnn\(n_mels: 'int', width"
        r".*--model.encoder_options '\{OPTION: VALUE\}' replaces all options",
    ),
    "n_mels again": (GOOD, "Tdnn", {"n_mels": 3}, "model.encoder_options: .*multiple values"),
    "a value": (GOOD, "Tdnn", {"width": -1}, "cannot be built .RuntimeError"),
    "reads a value": (
        "import torch\nfrom own_encoder import Tdnn\n"
        "class E(Tdnn):\n"
        "    def __init__(self, n_mels):\n"
        "        super().__init__(n_mels, int(torch.ones(1).item()) + 3)\n",
        "E",
        {},
        r'cannot be built under torch.device\("meta"\), where tensors have no values',
    ),
    "another shape": (
        "from own_encoder import Tdnn\nclass E(Tdnn):\n    subsampling = 3\n",
        "E",
        {},
        "model.encoder: .*:E: the shape of its output is",
    ),
}


@pytest.mark.parametrize("kind", MODULES)
def test_a_class_that_cannot_be_used_is_refused_with_the_reason(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, attribute, options, message = MODULES[kind]
    module = write_module(tmp_path, "mine_" + kind.replace(" ", "_"), text)
    monkeypatch.syspath_prepend(tmp_path)
    name = f"{module}:{attribute}"
    with pytest.raises(EncoderError, match=message):
        build_named(name, options, 40, [name])


def test_a_module_that_is_not_there_is_named_with_the_remedy() -> None:
    with pytest.raises(EncoderError, match=r"there is no module no_such.*PYTHONPATH=FOLDER"):
        build_named("no_such.module:E", {}, 40, ["no_such.module:E"])


@pytest.mark.parametrize("make", [build_named, build_model])
def test_only_what_the_user_named_is_imported(make: Callable[..., nn.Module]) -> None:
    name, sizes = "antigravity:E", (40,)
    arguments = (name, {}, *sizes) if make is build_named else (ModelConfig(encoder=name), 40, 3)
    with pytest.raises(EncoderError, match="imported only where you name it"):
        make(*arguments, ["other:E"])
    assert "antigravity" not in sys.modules
