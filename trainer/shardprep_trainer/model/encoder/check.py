"""Whether a module keeps the contract of encoders, see `contract`.

Axis legend: B batch, T frames, F mel bins, D width of the output.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from shardprep_trainer.errors import EncoderError
from shardprep_trainer.model.encoder.contract import Encoder

# Lengths of utterances in a batch: one frame, odd and even numbers, and padding or none.
_BATCHES = ((1,), (2,), (37,), (37, 37), (40, 23, 6, 1))
_TOLERANCE = 1e-4
_SEE = "the contract is in docs/training.md, A model of your own"


def check_encoder(encoder: nn.Module, n_mels: int) -> None:
    """Check a module against the contract of encoders, for tests of your own.

        def test_mine_is_an_encoder():
            shardprep_trainer.check_encoder(Mine(40, width=64), 40)

    It computes in evaluation mode and, with a copy, in training mode; the module stays as it was.

    Args:
        encoder: The module.
        n_mels: Mel bins F that it takes.

    Raises:
        EncoderError: It breaks the contract; the message says which part.
    """
    name = type(encoder).__name__
    try_encoder(encoder, n_mels, name)
    _check_memory(encoder, name)
    with _mode(encoder, training=False), torch.no_grad():
        for lengths in _BATCHES:
            _check_batch(encoder, n_mels, lengths, name)
        _check_autocast(encoder, n_mels, name)
        _check_copy(encoder, n_mels, name)
    for masked in (False, True):
        _check_gradients(copy.deepcopy(encoder).train(), n_mels, name, masked=masked)


def try_encoder(encoder: nn.Module, n_mels: int, name: str) -> None:
    """Try an encoder on a tiny batch, with and without a mask; draws no random numbers.

    Args:
        encoder: The module.
        n_mels: Mel bins F that it takes.
        name: What the error begins with.

    Raises:
        EncoderError: It lacks an attribute, or its output is of another shape or kind.
    """
    check_attributes(encoder, name)
    with _mode(encoder, training=False), torch.no_grad(), torch.random.fork_rng(devices=[]):
        mel, mask = _example(encoder, n_mels, (9, 4))
        _encode(encoder, mel, mask, name)
        _encode(encoder, mel, None, name)


def check_attributes(encoder: nn.Module, name: str) -> None:
    """Make sure that a module says what its output is; for the rest see `try_encoder`."""
    if not isinstance(encoder, nn.Module):
        raise _broken(name, f"found a {type(encoder).__name__}", "a torch.nn.Module")
    for attribute in ("width", "subsampling"):
        value = getattr(encoder, attribute, None)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            found = "nothing" if value is None else repr(value)[:40]
            raise _broken(name, f"its attribute {attribute} is {found}", "a whole number above 0")


def _encode(encoder: nn.Module, mel: Tensor, mask: Tensor | None, name: str) -> Tensor:
    """The output, once its shape, dtype and values are those of an encoder."""
    given = mel.clone()
    how = f"mel {tuple(mel.shape)} and " + ("no mask" if mask is None else "a mask")
    try:
        out = encoder(mel, mask)
    # Of any kind: it is the user's code.
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise _broken(name, f"forward failed on {how} ({said})", "any B and T of 1 or more") from (
            error
        )
    if not isinstance(out, Tensor):
        raise _broken(name, f"forward returned a {type(out).__name__} for {how}", "one tensor")
    assert isinstance(encoder, Encoder)
    expected = (mel.shape[0], -(-mel.shape[1] // encoder.subsampling), encoder.width)
    if tuple(out.shape) != expected:
        allowed = f"{expected}: (B, ceil(T / subsampling), width)"
        raise _broken(name, f"the shape of its output is {tuple(out.shape)} for {how}", allowed)
    if not out.is_floating_point():
        raise _broken(name, f"its output is {out.dtype} for {how}", "a floating dtype")
    if not out.isfinite().all():
        raise _broken(name, f"its output is not finite for {how}", "finite numbers everywhere")
    if not torch.equal(mel, given):
        raise _broken(name, "forward changes mel in place", "a mel that stays as it is")
    return out


def _check_batch(encoder: nn.Module, n_mels: int, lengths: Sequence[int], name: str) -> None:
    """An utterance comes out the same alone, padded, and beside others."""
    mel, mask = _example(encoder, n_mels, lengths)
    together = _encode(encoder, mel, mask, name)
    assert isinstance(encoder, Encoder)
    valid = mask[:, :: encoder.subsampling]
    for row, length in enumerate(lengths):
        alone = _encode(encoder, mel[row : row + 1, :length], None, name)[0]
        apart = (together[row][valid[row]] - alone).abs().max()
        if apart > _TOLERANCE * alone.abs().max().clamp(min=1):
            what = f"an utterance of {length} frames differs by {float(apart):.2g}"
            where = f"padded to {max(lengths)}, beside {len(lengths) - 1} others"
            if length == max(lengths):
                where = f"with a mask of True, beside {len(lengths) - 1} others"
            raise _broken(
                name, f"padding counts: {what} alone and {where}", "the same in eval mode"
            )


def _check_autocast(encoder: nn.Module, n_mels: int, name: str) -> None:
    mel, mask = _example(encoder, n_mels, (9, 4))
    if mel.dtype == torch.float32:
        with torch.autocast(mel.device.type, torch.bfloat16):
            _encode(encoder, mel, mask, f"{name}, under autocast")


def _check_copy(encoder: nn.Module, n_mels: int, name: str) -> None:
    try:
        copied = copy.deepcopy(encoder)
    except Exception as error:
        raise _broken(name, f"copy.deepcopy fails ({error})", "a module that can be copied") from (
            error
        )
    mel, mask = _example(encoder, n_mels, (9, 4))
    if not torch.equal(_encode(copied, mel, mask, name), _encode(encoder, mel, mask, name)):
        raise _broken(name, "a copy gives another output", "the same output in eval mode")


def _check_memory(encoder: nn.Module, name: str) -> None:
    for key, weight in encoder.named_parameters():
        if not weight.is_contiguous():
            raise _broken(name, f"the weight {key} is not contiguous", "contiguous weights")


def _check_gradients(encoder: nn.Module, n_mels: int, name: str, *, masked: bool) -> None:
    mel, mask = _example(encoder, n_mels, (40, 23, 31) if masked else (40, 40, 40))
    out = _encode(encoder, mel, mask if masked else None, f"{name}, in training")
    assert isinstance(encoder, Encoder)
    valid = mask[:, :: encoder.subsampling]
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(out.shape, generator=generator).to(out)
    trained = {key: w for key, w in encoder.named_parameters() if w.requires_grad}
    loss = (out * weights)[valid].float().sum()
    if trained and not loss.requires_grad:
        raise _broken(name, "its output has no gradient", "a gradient for every weight")
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True) if trained else ()
    for key, gradient in zip(trained, found, strict=True):
        if gradient is None:
            raise _broken(name, f"the weight {key} gets no gradient", "a gradient for every weight")
        if not gradient.isfinite().all():
            raise _broken(name, f"the gradient of {key} is not finite", "finite gradients")


def _example(encoder: nn.Module, n_mels: int, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Seeded log-mels (B, T, F) with zeros for padding, and their mask (B, T)."""
    weight = next((w for w in encoder.parameters() if w.is_floating_point()), torch.zeros(1))
    generator = torch.Generator().manual_seed(sum(lengths))
    mel = torch.randn((len(lengths), max(lengths), n_mels), generator=generator) * 3 - 8
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    mel = mel.masked_fill(~mask.unsqueeze(2), 0.0)
    return mel.to(weight.device, weight.dtype), mask.to(weight.device)


@contextmanager
def _mode(encoder: nn.Module, *, training: bool) -> Iterator[None]:
    """Put a module into a mode, and each of its layers back into its own."""
    before = [(layer, layer.training) for layer in encoder.modules()]
    encoder.train(training)
    try:
        yield
    finally:
        for layer, own in before:
            layer.training = own


def _broken(name: str, found: str, allowed: str) -> EncoderError:
    return EncoderError(f"{name}: {found}, allowed is {allowed}; {_SEE}")
