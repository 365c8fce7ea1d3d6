"""The trunk equals a plain residual network, whatever the layout, the padding and the company."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shardprep_trainer.config.fields import ModelConfig
from shardprep_trainer.convert import FORMATS, check_parity
from shardprep_trainer.learning.optimizer import split_weights
from shardprep_trainer.model.build import build_model
from shardprep_trainer.model.layers import MaskedBatchNorm1d
from shardprep_trainer.model.sync_norm import SyncedBatchNorm1d, synchronise
from shardprep_trainer.model.trunk import BasicBlock, ResNet, ResNetConformer

SMALL: dict[str, Any] = {
    "channels": (4, 6, 8),
    "blocks": (1, 2, 1),
    "time_strides": (1, 2, 2),
    "mel_strides": (1, 2, 2),
    "stem_strides": (1, 2),
}
TRUNK = "shardprep_trainer.model.trunk:ResNet"


def trunk(squeeze: str, **changes: Any) -> ResNet:
    """A trunk whose running statistics and gains are not those that it begins with."""
    torch.manual_seed(0)
    model = ResNet(20, **{**SMALL, "squeeze": squeeze, **changes})
    for layer in model.modules():
        if isinstance(layer, MaskedBatchNorm1d):
            for values in (layer.weight, layer.running_var):
                torch.nn.init.uniform_(values, 0.5, 2.0)
            for values in (layer.bias, layer.running_mean):
                torch.nn.init.normal_(values)
    return model


def norm(x: Tensor, layer: MaskedBatchNorm1d, training: bool) -> Tensor:
    """BatchNorm of images (B, C, T, F)."""
    mean, variance = layer.running_mean, layer.running_var
    if training:
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    assert mean is not None
    assert variance is not None
    scale = (layer.weight / (variance + layer.eps).sqrt())[:, None, None]
    return (x - mean[:, None, None]) * scale + layer.bias[:, None, None]


def oracle(model: ResNet, mel: Tensor, training: bool = False) -> Tensor:
    """A residual network by its definition, on utterances (B, T, F) without padding."""
    centered = mel - mel.mean(1, keepdim=True)
    deviation = (mel.var(1, keepdim=True, correction=0) + 1e-3).sqrt()
    every = {"mel": mel, "centered": centered, "normalized": centered / deviation}
    images = [every[name] for name in model.images]
    x = F.conv2d(torch.stack(images, dim=1), model.stem.weight, None, model.stem.stride, 1)
    x = norm(x, model.norm, training).relu()
    for block in model.blocks:
        assert isinstance(block, BasicBlock)
        y = norm(F.conv2d(x, block.first.weight, None, block.stride, 1), block.first_norm, training)
        y = norm(F.conv2d(y.relu(), block.second.weight, None, 1, 1), block.second_norm, training)
        if block.squeeze is not None:
            down, up = block.squeeze.down, block.squeeze.up
            weights = F.linear(y.mean((1, 2)), down.weight, down.bias).relu()
            y = y * F.linear(weights, up.weight, up.bias).sigmoid()[:, None, None]
        if block.past is not None:
            assert block.past_norm is not None
            kernel = block.past.weight[:, :, None, None]
            x = norm(F.conv2d(x, kernel, None, block.stride), block.past_norm, training)
        x = (x + y).relu()
    batch, channels, frames, bins = x.shape
    return x.permute(0, 2, 3, 1).reshape(batch, frames, bins * channels)


@pytest.mark.parametrize("squeeze", ["none", "frequency"])
@pytest.mark.parametrize("training", [True, False])
def test_a_trunk_is_a_residual_network(squeeze: str, training: bool) -> None:
    model = trunk(squeeze).double().train(training)
    mel = torch.randn(3, 29, 20, dtype=torch.float64)
    expected = oracle(model, mel, training)
    found = model(mel, None)
    assert found.shape == (3, 8, model.width)
    torch.testing.assert_close(found, expected)
    ours = torch.autograd.grad(found.square().sum(), list(model.parameters()))
    theirs = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("squeeze", ["none", "frequency"])
@pytest.mark.parametrize("lengths", [(1,), (1, 2), (33, 1, 16, 17), (5, 29)])
def test_an_utterance_comes_out_as_the_oracle_has_it_alone(
    squeeze: str, lengths: tuple[int, ...]
) -> None:
    model = trunk(squeeze).double().eval()
    mels = [torch.randn(length, 20, dtype=torch.float64) for length in lengths]
    mel = torch.nn.utils.rnn.pad_sequence([*mels, torch.randn(37, 20).double()], batch_first=True)
    mask = torch.arange(37) < torch.tensor([*lengths, 37])[:, None]
    together = model(mel, mask)
    for out, own in zip(together, mels, strict=False):
        frames = -(-len(own) // 4)
        torch.testing.assert_close(out[:frames], oracle(model, own[None])[0])
        assert not out[frames:].any()


@pytest.mark.parametrize("images", [("mel",), ("normalized",), ("centered", "mel")])
def test_the_images_are_those_that_are_named(images: tuple[str, ...]) -> None:
    model = trunk("frequency", images=images).double().eval()
    mel = torch.randn(2, 29, 20, dtype=torch.float64)
    torch.testing.assert_close(model(mel, None), oracle(model, mel))
    # A filter of the channel adds a number to each bin; noise shrinks all that is not the mean.
    filtered = model(mel + torch.randn(20), None)
    assert torch.allclose(filtered, model(mel, None)) == (images == ("normalized",))


@pytest.mark.parametrize("device_way", [True, False])
def test_statistics_in_training_are_those_of_valid_frames(
    device_way: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two utterances of one length beside two that are padded to twice that: four of one length.
    if device_way:
        monkeypatch.setattr("shardprep_trainer.model.cpu_kernels.applies_to", lambda x: False)
    mel = torch.randn(4, 16, 20, dtype=torch.float64)
    plain, masked = trunk("frequency").double().train(), trunk("frequency").double().train()
    expected = plain(mel, None)
    padded = torch.cat([mel, torch.zeros_like(mel)], dim=1)
    mask = (torch.arange(32) < 16).expand(4, -1)
    # The last frame of a convolution with a stride sees one frame of the padding, which is zeros.
    torch.testing.assert_close(masked(padded, mask)[:, :4], expected)
    for ours, theirs in zip(masked.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("squeeze", ["none", "frequency"])
@pytest.mark.parametrize("masked", [True, False])
def test_channels_stay_last_in_memory_and_weights_contiguous(squeeze: str, masked: bool) -> None:
    model = trunk(squeeze)
    seen: list[bool] = []

    def look(module: torch.nn.Module, given: Any) -> None:
        seen.append(given[0].permute(0, 2, 3, 1).is_contiguous())

    for block in model.blocks:
        for layer in (block, block.first, block.second):
            layer.register_forward_pre_hook(look)
    mask = (torch.arange(16) < torch.tensor([[16], [9], [3]])) if masked else None
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.randn(3, 16, 20), mask)
    assert out.is_contiguous()
    out.float().sum().backward()
    assert len(seen) == 3 * len(model.blocks)
    assert all(seen)
    for weight in model.parameters():
        assert weight.is_contiguous()
        assert weight.grad is not None
        assert weight.grad.is_contiguous()


def test_odd_numbers_of_channels_train_without_harm() -> None:
    """With other kernels of PyTorch's, this ended the process, or never ended."""
    model = trunk("none", channels=(3, 24, 48), stem_strides=(2, 1))
    for _ in range(5):
        model(torch.randn(3, 40, 20), None).sum().backward()
    assert all(w.grad is not None and w.grad.isfinite().all() for w in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": (1, 1)}, "blocks: found 2 stages, channels has 3"),
        ({"stem_strides": (1,)}, "stem_strides"),
        ({"channels": (4, 0, 8)}, "1 or more"),
        ({"squeeze": "time"}, "squeeze: found time, allowed: none, frequency"),
        ({"channels": 3}, "channels: found 3, allowed is a list of whole numbers"),
        ({"channels": "abc"}, "channels: found abc"),
        ({"channels": ()}, r"channels: found \(\)"),
        ({"blocks": (1, None, 1)}, "blocks: found"),
        ({"time_strides": (1, True, 1)}, "time_strides: found"),
        ({"mel_strides": (1, 1.5, 1)}, "mel_strides: found"),
        ({"stem_strides": 2}, "stem_strides: found 2"),
        ({"images": ["mel", "maybe"]}, r"images: found .*maybe.*, allowed is a list of mel, cent"),
        ({"images": "mel"}, "images: found mel, allowed is a list of"),
        ({"images": [["mel"]]}, "images: found"),
        ({"images": []}, "images: found"),
    ],
)
def test_a_trunk_that_cannot_be_says_why(changes: dict[str, Any], message: str) -> None:
    for made in (ResNet, ResNetConformer):
        with pytest.raises(ValueError, match=message):
            made(20, **{**SMALL, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 9, "heads": 2}, "dim: found 9 with heads 2, allowed is a multiple of heads"),
        ({"dim": "wide"}, "dim: found wide, allowed is a whole number"),
        ({"layers": True}, "layers: found True"),
        ({"heads": 0}, "heads: found 0"),
        ({"kernel_size": 14}, "kernel_size: found 14; allowed: an odd number"),
        ({"kernel_size": -3}, "kernel_size: found -3"),
        ({"kernel_size": 3.5}, "kernel_size: found 3.5"),
        ({"dropout": "x"}, "dropout: found x, allowed is 0 up to"),
        ({"dropout": None}, "dropout: found None"),
        ({"dropout": 1}, "dropout: found 1"),
    ],
)
def test_blocks_behind_a_trunk_that_cannot_be_say_why(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ResNetConformer(20, **{**SMALL, **changes})


def config(**changes: Any) -> ModelConfig:
    options = {name: list(value) for name, value in SMALL.items()}
    sizes = {"dim": 8, "pooling": "attentive_statistics", "embedding_dim": 6, **changes}
    return ModelConfig(encoder=TRUNK, encoder_options=options, **sizes)


def test_every_batch_norm_of_a_trunk_is_synchronised() -> None:
    model = build_model(config(), 20, 3)
    synchronise(model)
    norms = [layer for layer in model.modules() if isinstance(layer, torch.nn.BatchNorm1d)]
    assert len(norms) > 8
    assert all(type(layer) is SyncedBatchNorm1d for layer in norms)


def test_muon_moves_the_kernels_of_a_trunk() -> None:
    model = build_model(config(), 20, 3)
    matrices, _ = split_weights(model, model.classifier)
    kernels = [weight for weight in model.encoder.parameters() if weight.ndim == 4]
    assert {id(weight) for weight in kernels} <= {id(matrix) for matrix in matrices}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("form", ["torchscript", pytest.param("onnx", marks=pytest.mark.slow)])
def test_an_exported_trunk_gives_the_same_results(form: str) -> None:
    torch.manual_seed(0)
    model = build_model(config(), 20, 3).eval()
    convert, reopen = FORMATS[form]
    file = convert(model, {"n_mels": "20"})
    assert check_parity(model, reopen(file), 20) < 1e-4


def test_a_trunk_is_one_graph() -> None:
    model = trunk("frequency").train()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    mel, mask = torch.randn(3, 16, 20), torch.arange(16) < torch.tensor([[16], [9], [3]])
    for given in (None, mask):
        torch.testing.assert_close(compiled(mel, given), model(mel, given), atol=1e-5, rtol=1e-4)
