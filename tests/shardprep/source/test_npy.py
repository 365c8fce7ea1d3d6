"""`.npy` files: what numpy.load reads of them, and no file that it could not read safely."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardprep.source.features import Expected, load_features
from shardprep.source.npy import read_npy


def saved(array: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_float_array_is_read_as_numpy_reads_it(
    tmp_path: Path, dtype: str, order: Any
) -> None:
    mel = np.random.default_rng(0).normal(size=(5, 3)).astype(dtype, order=order)
    np.save(tmp_path / "a.npy", mel)
    loaded = load_features(tmp_path / "a.npy", Expected(3, 0), npy=True)
    np.testing.assert_array_equal(loaded, np.load(tmp_path / "a.npy").astype(np.float32))
    assert loaded.dtype == np.float32
    assert loaded.flags.c_contiguous


def test_a_header_of_version_2_is_read() -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ones((2, 3), np.float32), version=(2, 0))
    assert read_npy(buffer.getvalue()).shape == (2, 3)


def test_every_truncation_is_a_fault() -> None:
    data = saved(np.ones((2, 3), np.float32))
    for size in range(len(data)):
        with pytest.raises(ValueError, match=r"empty|early|begins with|header cannot be read"):
            read_npy(data[:size])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (saved(np.array([{}, None]), allow_pickle=True), "Python objects, and nothing is unpick"),
        (saved(np.ones((2, 3), np.int64)), "holds int64 numbers.*numpy.asarray"),
        (saved(np.ones((2, 3), np.complex64)), "holds complex64 numbers"),
        (saved(np.ones((0, 3), np.float32)), r"has shape \(0, 3\), expected numbers"),
        (saved(np.ones((2, 3), np.float32)) + b"x", "goes on after the end"),
        (saved(np.ones((2, 3)))[:90] + b"9" * 38, "header cannot be read"),
        (b"PK\x03\x04", "not a NumPy file|packed|zip|archive"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    ],
)
def test_other_files_are_named(data: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_npy(data)


def test_a_shape_is_not_believed() -> None:
    data = saved(np.ones((2, 3), np.float32)).replace(b"(2, 3)", b"(2000000000000, 3)")
    with pytest.raises(ValueError, match="ends early|header"):
        read_npy(data)


def test_nested_headers_are_refused() -> None:
    head = b"(" * 9000
    data = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head
    with pytest.raises(ValueError, match="header cannot be read"):
        read_npy(data)


@pytest.mark.parametrize(
    ("shape", "frames", "said"),
    [
        ((3, 5), 0, r"has shape \(3, 5\), expected \(frames, 3\): it is transposed; save array.T"),
        ((1, 5, 3), 0, r"save array.squeeze\(\)"),
        ((5,), 0, "waveform"),
        ((5, 3), 4, "has 5 frames, but frames says 4"),
    ],
)
def test_wrong_shapes_have_a_remedy(
    tmp_path: Path, shape: tuple[int, ...], frames: int, said: str
) -> None:
    np.save(tmp_path / "a.npy", np.zeros(shape, np.float32))
    with pytest.raises(ValueError, match=said):
        load_features(tmp_path / "a.npy", Expected(3, frames, "frames"), npy=True)
