"""Element type uint8, held against exact fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shardprep.format.quantised import Scale, are_scales, dequantise, quantise, rounded

_MELS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=6),
    elements=st.floats(-(2.0**99), 2.0**99, width=32) | st.floats(-21, 9, width=32),
)


@given(_MELS)
def test_no_value_is_further_from_its_level_than_half_a_step(mel: np.ndarray) -> None:
    levels, scale = quantise(mel)
    assert levels.dtype == np.uint8
    low, high = Fraction(float(mel.min())), Fraction(float(mel.max()))
    # float32 has 24 bits: the step is rounded once, and multiplied by 255 at most.
    slack = (high - low) / 2**20 + Fraction(2) ** -140
    assert Fraction(scale.minimum) == low
    for level, value in zip(levels.flat, mel.flat, strict=True):
        exact = Fraction(scale.minimum) + Fraction(scale.step) * int(level)
        assert abs(exact - Fraction(float(value))) <= Fraction(scale.step) / 2 + slack


@given(_MELS)
def test_widened_values_are_a_product_and_a_sum_each_rounded_once(mel: np.ndarray) -> None:
    levels, scale = quantise(mel)
    found = dequantise(levels, *scale)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    for level, value in zip(levels.flat, found.flat, strict=True):
        product = np.float32(np.float64(scale.step) * float(level))
        assert value == np.float32(np.float64(product) + np.float64(scale.minimum))


def test_all_levels_are_used_from_the_smallest_value_to_the_largest() -> None:
    levels, scale = quantise(np.linspace(-20, 8, 256, dtype=np.float32)[:, None])
    assert levels[:, 0].tolist() == list(range(256))
    assert scale.minimum == -20
    assert scale.step == np.float32(28 / 255)


def test_equal_values_come_back_exactly() -> None:
    mel = np.full((3, 2), -20.72, np.float32)
    levels, scale = quantise(mel)
    assert scale == Scale(float(np.float32(-20.72)), 0.0)
    assert np.array_equal(dequantise(levels, *scale), mel)


def test_wider_types_are_rounded_from_their_own_values() -> None:
    mel = np.array([[0.0, 1.0 + 1e-9, 255.0]], np.float64)
    assert quantise(mel)[0].tolist() == [[0, 1, 255]]


def test_values_that_float32_cannot_span_are_refused() -> None:
    with pytest.raises(ValueError, match="beyond the range of uint8; use --dtype float32"):
        quantise(np.array([[-3e38, 3e38]], np.float32))


@given(_MELS)
def test_every_scale_that_is_written_is_accepted(mel: np.ndarray) -> None:
    scale = quantise(mel)[1]
    assert are_scales(np.float32([scale.minimum]), np.float32([scale.step])).all()


@pytest.mark.parametrize(
    ("minimum", "step"),
    [(np.nan, 1), (0, np.nan), (np.inf, 1), (0, np.inf), (0, -1), (-3e38, 0), (0, 1e38)],
)
def test_other_scales_are_not(minimum: float, step: float) -> None:
    assert not are_scales(np.float32([minimum]), np.float32([step])).any()


def test_rounding_gives_what_readers_give() -> None:
    mel = np.array([[0.1, 2.55], [1.0, 0.0]], np.float32)
    assert rounded(mel, "float16").dtype == np.float16
    assert np.array_equal(rounded(mel, "float32"), mel)
    levels, scale = quantise(mel)
    assert np.array_equal(rounded(mel, "uint8"), dequantise(levels, *scale))
