"""Products of float32 matrices on a GPU: in TensorFloat-32, except for those of the cosine head.

TensorFloat-32 keeps 10 bits of the fraction, as float16 does, and is several times as fast. It
cannot distinguish cosines closer than 5e-4. The setting applies to the whole process, and
`accelerate` sets it for compiled runs without mixed precision. So the head switches it off for its
own products.

Axis legend: B batch, D embedding width, S speakers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def allow_tensor_float32() -> None:
    """Let float32 products on GPUs be computed in TensorFloat-32, from now on in this process."""
    torch.set_float32_matmul_precision("high")


def exact_product(features: Tensor, directions: Tensor) -> Tensor:
    """Features (B, D) times directions (S, D) in full float32, also the gradients: (B, S)."""
    out: Tensor = _uncompiled()(features, directions)
    return out


@functools.cache
def _uncompiled() -> Callable[..., Tensor]:
    # Compiled code would keep the setting of the moment of compilation. Called on first use, as it
    # imports the whole compiler, which takes a second.
    product: Callable[..., Tensor] = torch.compiler.disable(_ExactProduct.apply)  # type: ignore[no-untyped-call]
    return product


class _ExactProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, directions: Tensor) -> Tensor:
        ctx.save_for_backward(features, directions)
        with _exact():
            return features @ directions.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        features, directions = ctx.saved_tensors
        with _exact():
            return grad @ directions, grad.T @ features


@contextmanager
def _exact() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
