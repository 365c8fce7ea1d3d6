"""Layers against PyTorch's own, on the frames that are valid."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shardprep_trainer.model.layers import (
    MaskedBatchNorm1d,
    SelfAttention,
    masked_mean,
)


def mask_of(lengths: list[int]) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


@pytest.fixture(params=[True, False], ids=["by rows", "by masks"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """BatchNorm as a CPU trains with it, and as a GPU does."""
    monkeypatch.setattr("shardprep_trainer.model.cpu_kernels.applies_to", lambda x: request.param)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
def test_batch_norm_counts_valid_frames_only(momentum: float | None) -> None:
    ours = MaskedBatchNorm1d(5, momentum=momentum).double()
    mean = torch.zeros(5, dtype=torch.float64)
    variance = torch.ones(5, dtype=torch.float64)
    for step, lengths in enumerate(([9, 4, 1], [3, 3], [12]), start=1):
        x = torch.randn(len(lengths), 5, max(lengths), dtype=torch.float64) * 3 + 2
        valid = torch.tensor(
            [[x[b, c, t] for b, n in enumerate(lengths) for t in range(n)] for c in range(5)],
            dtype=torch.float64,
        )
        rate = 1 / step if momentum is None else momentum
        mean = (1 - rate) * mean + rate * valid.mean(1)
        variance = (1 - rate) * variance + rate * valid.var(1, correction=1)
        output = ours(x.masked_fill(~mask_of(lengths)[:, None], torch.nan), mask_of(lengths))
        expected = (x[0, :, 0] - valid.mean(1)) / (valid.var(1, correction=0) + 1e-5).sqrt()
        torch.testing.assert_close(output[0, :, 0], expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(ours.running_mean, mean, atol=1e-12, rtol=0)
        torch.testing.assert_close(ours.running_var, variance, atol=1e-12, rtol=0)
        assert ours.num_batches_tracked == step


@pytest.mark.usefixtures("way")
def test_batch_norm_equals_pytorch_on_the_valid_frames_with_gradients() -> None:
    ours, pytorch = MaskedBatchNorm1d(5).double(), nn.BatchNorm1d(5).double()
    for norm in (ours, pytorch):
        norm.weight.data = torch.linspace(0.5, 2.0, 5, dtype=torch.float64)
        norm.bias.data = torch.linspace(-1.0, 1.0, 5, dtype=torch.float64)
    mask = mask_of([9, 4, 1])
    x = torch.randn(3, 5, 9, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(14, 5, dtype=torch.float64)
    results = []
    for norm, output in (
        (ours, ours(x, mask).transpose(1, 2)[mask]),
        (pytorch, pytorch(x.transpose(1, 2)[mask])),
    ):
        gradients = torch.autograd.grad((output * weight).sum(), [x, norm.weight, norm.bias])
        results.append([output, *gradients])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("lengths", [[], [0, 0], [1, 0]])
def test_batch_norm_keeps_its_statistics_when_there_is_no_variance(lengths: list[int]) -> None:
    norm = MaskedBatchNorm1d(5)
    before = [buffer.clone() for buffer in norm.buffers()]
    mask = torch.arange(4) < torch.tensor(lengths, dtype=torch.long)[:, None]
    assert norm(torch.randn(len(lengths), 5, 4), mask).isfinite().all()
    if not lengths:
        norm(torch.randn(0, 5, 4))
    for buffer, expected in zip(norm.buffers(), before, strict=True):
        assert torch.equal(buffer, expected)


@pytest.mark.parametrize(("on_cpu", "tolerance"), [(False, 1e-6), (True, 1e-5)])
def test_batch_norm_sums_half_precision_in_float32(
    on_cpu: bool, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # PyTorch's own, which a CPU trains with, adds one frame to the other: 70,000 roundings.
    monkeypatch.setattr("shardprep_trainer.model.cpu_kernels.applies_to", lambda x: on_cpu)
    norm = MaskedBatchNorm1d(1)
    # 70,000 frames around 60: a float16 sum overflows, a bfloat16 sum stalls.
    x = (torch.randn(1, 1, 70_000) + 60).half()
    norm(x, torch.ones(1, 70_000).bool())
    assert norm.running_mean is not None
    expected = 0.1 * x.double().mean()
    torch.testing.assert_close(norm.running_mean[0].double(), expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("lengths", [None, [9, 4, 1]])
def test_self_attention_in_training_equals_pytorch(lengths: list[int] | None) -> None:
    torch.manual_seed(0)
    ours = SelfAttention(12, 3, batch_first=True).double().train()
    oracle = nn.MultiheadAttention(12, 3, batch_first=True).double().train()
    for weight in ours.parameters():
        nn.init.normal_(weight)
    oracle.load_state_dict(ours.state_dict())
    x = torch.randn(3, 9, 12, dtype=torch.float64, requires_grad=True)
    padding = None
    if lengths is not None:
        beyond = torch.arange(9) >= torch.tensor(lengths)[:, None]
        padding = torch.zeros(3, 9, dtype=x.dtype).masked_fill(beyond, -torch.inf)
    results = []
    for module in (ours, oracle):
        out, weights = module(x, x, x, key_padding_mask=padding, need_weights=False)
        assert weights is None
        results.append([out, *torch.autograd.grad(out.square().sum(), (x, *module.parameters()))])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_self_attention_trains_in_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ours = SelfAttention(12, 3, batch_first=True).to(dtype).train()
    x = torch.randn(2, 5, 12).to(dtype)
    padding = torch.zeros(2, 5, dtype=dtype)
    padding[1, 3:] = -torch.inf
    found = ours(x, x, x, key_padding_mask=padding)[0]
    expected = ours.eval()(x, x, x, key_padding_mask=padding)[0]
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)


def test_self_attention_compiles_in_one_piece() -> None:
    layer, x = SelfAttention(12, 3, dropout=0.1, batch_first=True).train(), torch.randn(2, 5, 12)
    explained = torch._dynamo.explain(lambda x: layer(x, x, x, need_weights=False)[0])(x)
    assert explained.graph_break_count == 0, explained.break_reasons


def test_the_mean_frame_leaves_padding_out() -> None:
    mel = torch.randn(2, 50, 40)
    mel[1, 30:] = torch.nan
    mask = torch.arange(50) < torch.tensor([50, 30])[:, None]
    expected = torch.stack([mel[0].mean(0), mel[1, :30].mean(0)])
    torch.testing.assert_close(masked_mean(mel, mask)[:, 0], expected)
