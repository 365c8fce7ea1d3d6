"""The ways to train on a CPU, against PyTorch's own."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardprep_trainer.model.cpu_kernels import applies_to, drop, largest_batch, multiply
from shardprep_trainer.model.layers import (
    Dropout,
    Linear,
    convolve_depthwise,
    convolve_pointwise,
    zero_padding,
)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean_and_each_value_independently(p: float) -> None:
    torch.manual_seed(0)
    found = drop(torch.ones(400_003), p)
    kept = found != 0
    assert kept.double().mean().item() == pytest.approx(1 - p, abs=0.004)
    assert found[kept].unique().item() == pytest.approx(1 / (1 - p), rel=1e-3)
    for apart in (1, 2, 3, 4, 5):
        together = (kept[apart:] & kept[:-apart]).double().mean().item()
        assert together == pytest.approx((1 - p) ** 2, abs=0.004)


@pytest.mark.parametrize(("p", "expected"), [(0.0, 1.0), (1.0, 0.0)])
def test_dropout_of_nothing_and_of_all(p: float, expected: float) -> None:
    x, state = torch.ones(100_000, requires_grad=True), torch.get_rng_state()
    assert (Dropout(p)(x) == expected).all()
    assert p or torch.equal(torch.get_rng_state(), state)


def test_dropout_passes_the_gradient_of_what_it_kept() -> None:
    x = torch.randn(50, 3, dtype=torch.float64, requires_grad=True)
    found = drop(x, 0.5)
    found.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.where(found == 0, 0.0, 2.0).to(x.dtype))


def test_dropout_depends_on_pytorchs_generator_alone() -> None:
    layer, x = Dropout(0.3), torch.ones(32, 7, requires_grad=True)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append((layer(x), layer(x)))
    assert all(torch.equal(one, other) for one, other in zip(found[0], found[1], strict=True))
    assert not torch.equal(found[0][0], found[0][1])
    assert not torch.equal(found[0][0], found[2][0])


@pytest.mark.parametrize("frames", [1, 20, 32, 75])
@pytest.mark.parametrize("width", [1, 7, 31])
def test_convolutions_equal_pytorch_with_gradients(width: int, frames: int) -> None:
    torch.manual_seed(0)
    deep = nn.Conv1d(6, 6, width, groups=6, padding=width // 2).double()
    point = nn.Conv1d(6, 4, 1).double()
    x = torch.randn(2, frames, 6, dtype=torch.float64, requires_grad=True)
    results = []
    for ours in (True, False):
        if ours:
            out = convolve_pointwise(convolve_depthwise(x, deep), point)
        else:
            out = point(deep(x.transpose(1, 2))).transpose(1, 2)
        weights = (x, *deep.parameters(), *point.parameters())
        results.append([out, *torch.autograd.grad(out.square().sum(), weights)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-11)


def test_an_empty_batch_is_convolved_to_nothing() -> None:
    deep = nn.Conv1d(6, 6, 7, groups=6, padding=3)
    out = convolve_depthwise(torch.zeros(0, 20, 6), deep)
    out.sum().backward()
    assert out.shape == (0, 20, 6)
    assert deep.weight.grad is not None
    assert not deep.weight.grad.any()


@pytest.mark.parametrize("shape", [(3, 50, 24), (50, 24), (24,), (0, 50, 24), (3, 0, 24)])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("capability", "convolves"), [("AVX512", True), ("AVX2", False)])
def test_products_equal_pytorch_with_gradients(
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    biased: bool,
    capability: str,
    convolves: bool,
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    convolve, calls = F.conv2d, []

    def conv2d(*arguments: Any) -> Tensor:
        calls.append(arguments)
        return convolve(*arguments)

    monkeypatch.setattr(F, "conv2d", conv2d)
    torch.manual_seed(0)
    layer = Linear(24, 10, bias=biased)
    x = torch.randn(shape, requires_grad=True)
    assert applies_to(x)
    results = []
    for out in (layer(x), F.linear(x, layer.weight, layer.bias)):
        assert out.shape == (*shape[:-1], 10)
        results.append([out, *torch.autograd.grad(out.square().sum(), (x, *layer.parameters()))])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert bool(calls) == (convolves and len(shape) == 3 and 0 not in shape)


@pytest.mark.parametrize("lengths", [[5, 5], [5, 0], [1, 3], [0, 0]])
def test_padding_is_zeroed_with_its_gradient(lengths: list[int]) -> None:
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    assert applies_to(x)
    assert torch.equal(zero_padding(x, mask), torch.where(mask[:, :, None], x, 0.0))
    assert not zero_padding(torch.full_like(x, torch.nan), ~mask)[mask].any()
    assert torch.autograd.gradcheck(lambda x: zero_padding(x, mask), (x,))


def test_autocast_narrows_what_it_narrows_in_pytorch() -> None:
    torch.manual_seed(0)
    deep, point = nn.Conv1d(6, 6, 7, groups=6, padding=3), nn.Conv1d(6, 4, 1)
    x = torch.randn(2, 40, 6, requires_grad=True)

    def ours() -> Tensor:
        return convolve_pointwise(convolve_depthwise(x, deep), point)

    def pytorchs() -> Tensor:
        return point(deep(x.transpose(1, 2))).transpose(1, 2)

    results = []
    for compute in (ours, pytorchs):
        with torch.autocast("cpu", torch.bfloat16):
            out = compute()
        assert out.dtype == torch.bfloat16
        weights = (x, *deep.parameters(), *point.parameters())
        gradients = torch.autograd.grad(out.float().square().sum(), weights)
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
        results.append([out.float(), *gradients])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(
            found, expected, atol=0.02 * expected.detach().abs().max().item(), rtol=0
        )


def test_without_gradients_nothing_is_other_than_pytorchs() -> None:
    x, layer = torch.randn(3, 50, 24), Linear(24, 10)
    with torch.no_grad():
        assert not applies_to(x)
        assert torch.equal(multiply(x, layer.weight, layer.bias), nn.Linear.forward(layer, x))


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_freed_memory_is_used_again() -> None:
    script = """
import resource, sys, torch
from shardprep_trainer.model.cpu_kernels import keep_memory
if sys.argv[1] == "keep":
    keep_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    torch.ones(10 * 2**20)  # 40 MiB, in 10,240 pages
for _ in range(20):
    step()
before = faults()
for _ in range(10):
    step()
print(faults() - before)
"""
    pages = {}
    for how in ("keep", "plain"):
        command = [sys.executable, "-c", script, how]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        pages[how] = int(done.stdout)
    assert pages["keep"] * 5 < pages["plain"]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_memory_between_what_is_kept_goes_back_to_the_system() -> None:
    script = """
import torch
from shardprep_trainer.model.cpu_kernels import keep_memory, return_memory
keep_memory()
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20
before = resident()
freed, kept = [], []
for _ in range(20):
    freed.append(torch.ones(10 * 2**18))  # 10 MiB
    kept.append(torch.ones(2**10))
del freed
full = resident()
return_memory(torch.device("cpu"))
print(full - before, resident() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    full, left = map(float, done.stdout.split())
    assert full > 190
    assert left < 20


@pytest.mark.parametrize(
    ("device", "asked", "frames"), [("cpu", 32768, 4096), ("cpu", 100, 100), ("cuda", 32768, 32768)]
)
def test_batches_of_whole_utterances_are_small_on_a_cpu(
    device: str, asked: int, frames: int
) -> None:
    assert largest_batch(asked, torch.device(device)) == frames
