"""Pooling against loops in float64, written frame by frame."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from shardprep_trainer.model.pooling import (
    AttentiveStatisticsPooling,
    MeanPooling,
    SelfAttentivePooling,
)

Lengths = st.lists(st.integers(1, 12), min_size=1, max_size=4)
POOLINGS = {
    "mean": MeanPooling,
    "self_attentive": lambda: SelfAttentivePooling(3, hidden=5),
    "attentive_statistics": lambda: AttentiveStatisticsPooling(3, hidden=5),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return POOLINGS[name]()


def mask_of(lengths: list[int]) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def naive_attentive(
    pooling: SelfAttentivePooling, utterance: Tensor, values: Tensor | None = None
) -> list[float]:
    """Means of values by the softmax over t of v . tanh(W h_t + b), in plain Python."""
    weight, bias = pooling.hidden.weight.tolist(), pooling.hidden.bias.tolist()
    context = pooling.score.weight[0].tolist()
    scores = []
    for frame in utterance.tolist():
        hidden = [
            math.tanh(sum(w * h for w, h in zip(row, frame, strict=True)) + b)
            for row, b in zip(weight, bias, strict=True)
        ]
        scores.append(math.exp(sum(v * u for v, u in zip(context, hidden, strict=True))))
    return [
        sum(s * h for s, h in zip(scores, column, strict=True)) / sum(scores)
        for column in (utterance if values is None else values).T.tolist()
    ]


@given(lengths=Lengths)
@settings(max_examples=25, deadline=None)
def test_self_attentive_pooling_equals_a_loop_over_valid_frames(lengths: list[int]) -> None:
    pooling = SelfAttentivePooling(3, hidden=5).double()
    utterances = [torch.randn(length, 3, dtype=torch.float64) for length in lengths]
    x = nn.utils.rnn.pad_sequence(utterances, batch_first=True, padding_value=torch.nan)
    expected = torch.tensor([naive_attentive(pooling, u) for u in utterances], dtype=x.dtype)
    torch.testing.assert_close(pooling(x, mask_of(lengths)), expected, atol=1e-12, rtol=0)


@given(lengths=Lengths)
@settings(max_examples=25, deadline=None)
def test_attentive_statistics_equal_a_loop_over_valid_frames(lengths: list[int]) -> None:
    pooling = AttentiveStatisticsPooling(3, hidden=5).double()
    utterances = [torch.randn(length, 3, dtype=torch.float64) for length in lengths]
    x = nn.utils.rnn.pad_sequence(utterances, batch_first=True, padding_value=torch.nan)
    expected = []
    for utterance in utterances:
        mean = naive_attentive(pooling, utterance)
        # Equation 6 of arXiv 1803.10963: the weighted mean of squares less the squared mean.
        squares = naive_attentive(pooling, utterance, values=utterance.square())
        variances = [s - m * m for s, m in zip(squares, mean, strict=True)]
        expected.append(mean + [math.sqrt(max(v, 1e-6)) for v in variances])
    found = pooling(x, mask_of(lengths))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=x.dtype), atol=1e-9, rtol=0)


@given(lengths=Lengths)
@settings(max_examples=25, deadline=None)
def test_mean_pooling_equals_a_loop_over_valid_frames(lengths: list[int]) -> None:
    utterances = [torch.randn(length, 3, dtype=torch.float64) for length in lengths]
    x = nn.utils.rnn.pad_sequence(utterances, batch_first=True, padding_value=torch.nan)
    expected = torch.stack([sum(u) / len(u) for u in utterances])
    torch.testing.assert_close(MeanPooling()(x, mask_of(lengths)), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", POOLINGS)
def test_gradients_are_right(name: str) -> None:
    pooling = build(name).double()
    x = torch.randn(3, 6, 3, dtype=torch.float64, requires_grad=True)
    mask = mask_of([6, 1, 4])
    names, values = (
        zip(*pooling.named_parameters(), strict=True) if list(pooling.parameters()) else ((), ())
    )

    def pooled(x: Tensor, *parameters: Tensor) -> Tensor:
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(pooling, state, (x, mask))

    assert torch.autograd.gradcheck(pooled, (x, *values))


@pytest.mark.parametrize("name", POOLINGS)
def test_a_full_mask_is_no_mask(name: str) -> None:
    pooling = build(name).double()
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    full = pooling(x, torch.ones(2, 7).bool())
    torch.testing.assert_close(pooling(x), full, atol=1e-14, rtol=0)


@pytest.mark.parametrize("name", POOLINGS)
def test_an_utterance_without_frames_gives_zeros_and_spares_its_batch_mates(name: str) -> None:
    pooling = build(name)
    x = torch.randn(2, 7, 3)
    pooled = pooling(x, mask_of([7, 0]))
    # The deviations of nothing are the least there is.
    assert torch.equal(pooled[1][:3], torch.zeros(3))
    assert torch.equal(pooled[1][3:], torch.full_like(pooled[1][3:], 1e-3))
    torch.testing.assert_close(pooled[0], pooling(x)[0])


@pytest.mark.parametrize("name", POOLINGS)
def test_half_precision_frames_are_summed_in_float32(name: str) -> None:
    pooling = build(name)
    # Over 7,000 frames around 30 a float16 sum overflows.
    x = (torch.randn(1, 7000, 3) + 30).half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = pooling(x)
    assert pooled.dtype == torch.float32
    if name == "mean":
        torch.testing.assert_close(pooled, x.double().mean(1).float(), rtol=1e-6, atol=0)
    assert (pooled[:, :3] - 30).abs().max() < 0.1
    # Squares around 900 would leave nothing of a deviation of 1 in half precision.
    assert ((pooled[:, 3:] - 1).abs() < 0.1).all()


def test_attention_is_able_to_pick_a_single_frame() -> None:
    pooling = SelfAttentivePooling(3).double()
    pooling.hidden.weight.data = torch.eye(3, dtype=torch.float64)
    pooling.score.weight.data = torch.tensor([[200.0, 0.0, 0.0]], dtype=torch.float64)
    x = torch.randn(1, 9, 3, dtype=torch.float64)
    x[0, :, 0] = -1.0
    x[0, 4, 0] = 1.0
    torch.testing.assert_close(pooling(x)[0], x[0, 4], atol=1e-12, rtol=0)
