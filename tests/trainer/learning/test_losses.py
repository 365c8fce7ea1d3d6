"""Losses against formulas in float64, written one utterance at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from shardprep_trainer.learning.losses import AAMSoftmaxLoss, AMSoftmaxLoss, SoftmaxLoss

LOSSES = {"softmax": SoftmaxLoss, "am_softmax": AMSoftmaxLoss, "aam_softmax": AAMSoftmaxLoss}


def naive_am_softmax(cosines: Tensor, labels: Tensor, margin: float, scale: float) -> float:
    """Equation 6 of arXiv 1801.05599, term by term."""
    total = 0.0
    for row, label in zip(cosines.tolist(), labels.tolist(), strict=True):
        target = math.exp(scale * (row[label] - margin))
        others = sum(math.exp(scale * c) for j, c in enumerate(row) if j != label)
        total -= math.log(target / (target + others))
    return total / len(labels)


def batch(rows: int = 5, speakers: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cosines = torch.rand(rows, speakers, generator=generator, dtype=torch.float64) * 2 - 1
    return cosines, torch.randint(speakers, (rows,), generator=generator)


@given(
    rows=st.integers(1, 6),
    seed=st.integers(0, 999),
    margin=st.floats(0, 0.5),
    scale=st.floats(1, 64),
)
def test_am_softmax_equals_the_paper(rows: int, seed: int, margin: float, scale: float) -> None:
    cosines, labels = batch(rows, seed=seed)
    found = AMSoftmaxLoss(margin, scale)(cosines, labels).item()
    expected = naive_am_softmax(cosines, labels, margin, scale)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(
    rows=st.integers(1, 6),
    seed=st.integers(0, 999),
    margin=st.floats(0, 0.8),
    scale=st.floats(1, 64),
)
def test_aam_softmax_equals_the_paper(rows: int, seed: int, margin: float, scale: float) -> None:
    cosines, labels = batch(rows, seed=seed)
    total = 0.0
    for row, label in zip(cosines.tolist(), labels.tolist(), strict=True):
        angle = math.acos(row[label])
        # Equation 3 of arXiv 1801.07698; beyond pi, where it would rise again, a straight line.
        moved = math.cos(angle + margin)
        if angle + margin >= math.pi:
            moved = math.cos(angle) - margin * math.sin(margin)
        others = [scale * c for j, c in enumerate(row) if j != label]
        top = max(scale * moved, *others)
        summed = sum(math.exp(z - top) for z in (scale * moved, *others))
        total += top + math.log(summed) - scale * moved
    found = AAMSoftmaxLoss(margin, scale)(cosines, labels).item()
    assert found == pytest.approx(total / rows, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("cosine", [-1.0, 1.0])
def test_aam_softmax_has_finite_gradients_at_the_ends_of_the_cosine(cosine: float) -> None:
    cosines = torch.tensor([[cosine, 0.1, 0.2]], requires_grad=True)
    AAMSoftmaxLoss()(cosines, torch.tensor([0])).backward()
    assert cosines.grad is not None
    assert cosines.grad.isfinite().all()


def test_a_larger_margin_of_the_true_speaker_costs_more() -> None:
    cosines, labels = batch()
    for kind in (AMSoftmaxLoss, AAMSoftmaxLoss):
        losses = [kind(margin)(cosines, labels).item() for margin in (0.0, 0.1, 0.2, 0.4)]
        assert losses == sorted(losses)
        assert losses[0] == pytest.approx(naive_am_softmax(cosines, labels, 0.0, 30.0))


def test_softmax_is_am_softmax_without_margin_and_scale() -> None:
    logits, labels = batch()
    expected = naive_am_softmax(logits, labels, margin=0.0, scale=1.0)
    assert SoftmaxLoss()(logits, labels).item() == pytest.approx(expected, rel=1e-12)


def test_defaults_are_a_margin_of_two_tenths_and_a_scale_of_thirty() -> None:
    cosines, labels = batch()
    expected = naive_am_softmax(cosines, labels, margin=0.2, scale=30.0)
    assert AMSoftmaxLoss()(cosines, labels).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_right(name: str) -> None:
    scores, labels = batch()
    assert torch.autograd.gradcheck(LOSSES[name](), (scores.requires_grad_(), labels))


@pytest.mark.parametrize("name", LOSSES)
def test_scores_come_out_as_they_went_in(name: str) -> None:
    scores, labels = batch()
    before = scores.clone()
    LOSSES[name]()(scores, labels)
    assert torch.equal(scores, before)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_are_widened_first(name: str, dtype: torch.dtype) -> None:
    scores, labels = batch()
    narrow = scores.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = LOSSES[name]()(narrow, labels)
    assert loss.dtype == torch.float32
    expected = LOSSES[name]()(narrow.double(), labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_an_empty_batch_gives_a_zero_that_backpropagates(name: str) -> None:
    layer = nn.Linear(3, 7)
    loss = LOSSES[name]()(layer(torch.randn(0, 3)), torch.zeros(0, dtype=torch.long))
    assert loss.shape == ()
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ((2, 7), [0, 7], "labels run from 0 to 7, but the model knows speakers 0 to 6"),
        ((2, 7), [-1, 3], "labels run from -1 to 3"),
        ((2, 7), [[0], [1]], r"labels \(2, 1\) do not fit"),
        ((2, 7), [0], r"labels \(1,\) do not fit"),
        ((7,), [0], r"logits \(7,\)"),
    ],
)
def test_labels_that_cannot_be_are_refused(
    name: str, scores: tuple[int, ...], labels: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LOSSES[name]()(torch.zeros(scores), torch.tensor(labels))


@pytest.mark.parametrize(("margin", "scale"), [(-0.1, 30.0), (0.2, 0.0)])
def test_margin_and_scale_out_of_range_are_refused(margin: float, scale: float) -> None:
    with pytest.raises(ValueError, match="found .*; allowed: "):
        AMSoftmaxLoss(margin, scale)


@pytest.mark.parametrize("name", LOSSES)
def test_no_value_is_read_from_a_device(name: str) -> None:
    # A tensor on the meta device has no values: whoever asks for one gets an exception.
    loss = LOSSES[name]()(torch.zeros(4, 7, device="meta"), torch.zeros(4, device="meta").long())
    assert loss.shape == ()
