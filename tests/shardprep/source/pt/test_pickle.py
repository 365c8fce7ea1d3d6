"""The pickle of a plain matrix is recognised, and means what the interpreter makes of it."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch

from shardprep.source.pt.pickle import run_pickle, usual_call
from shardprep.source.pt.zip import read_records

SHAPES = [(1, 1), (255, 1), (256, 1), (1, 256), (65535, 1), (65536, 1), (2, 40_000)]
OTHERS: dict[str, Callable[[], object]] = {
    "requires grad": lambda: torch.randn(3, 4, requires_grad=True),
    "parameter": lambda: torch.nn.Parameter(torch.randn(3, 4)),
    "bfloat16": lambda: torch.randn(3, 4).bfloat16(),
    "int": lambda: torch.ones(3, 4).int(),
    "complex": lambda: torch.ones(3, 4) + 0j,
    "later rows of a larger one": lambda: torch.randn(9, 4)[6:],
    "negated view": lambda: torch.randn(3, 4).to(torch.complex64).conj().imag,
    "one dimension": lambda: torch.randn(12),
    "three dimensions": lambda: torch.randn(3, 4, 1),
    "dict": lambda: {"mel": torch.randn(3, 4)},
    "two tensors": lambda: [torch.randn(3, 4), torch.randn(3, 4)],
    "sparse": lambda: torch.randn(3, 4).to_sparse(),
}


def program_of(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return bytes(read_records(file.getvalue())["data.pkl"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_pickle_of_a_plain_matrix_is_recognised(shape: tuple[int, int], dtype: torch.dtype) -> None:
    program = program_of(torch.zeros(shape, dtype=dtype))
    assert usual_call(program) == run_pickle(io.BytesIO(program))


@pytest.mark.parametrize("name", OTHERS)
def test_any_other_pickle_is_left_to_the_interpreter(name: str) -> None:
    assert usual_call(program_of(OTHERS[name]())) is None


def test_a_changed_byte_is_not_recognised_or_means_what_the_interpreter_makes_of_it() -> None:
    program = bytearray(program_of(torch.zeros(300, 40)))
    recognised = 0
    for at in range(len(program)):
        for flip in (1, 2, 64, 128):
            program[at] ^= flip
            call = usual_call(bytes(program))
            if call is not None:
                recognised += 1
                assert call == run_pickle(io.BytesIO(program))
            program[at] ^= flip
    assert recognised > 10
