"""Products of float32 matrices on a GPU: in TensorFloat-32, except for those of the cosine head.

TensorFloat-32 keeps 10 bits of the fraction, as float16 does, and is several times as fast. It
cannot distinguish cosines closer than 5e-4. The setting applies to the whole process, and compiled
code reads it when it is compiled or run. So the products of the head are an operator of their own,
which a compiler keeps as it is, and which switches the setting off while it runs.

Axis legend: B batch, D embedding width, S speakers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# The operator is torch.ops.shardprep.exact_product.
_LIBRARY = torch.library.Library("shardprep", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define("exact_product(Tensor a, Tensor b) -> Tensor")  # type: ignore[no-untyped-call]


def allow_tensor_float32() -> None:
    """Let float32 products on GPUs be computed in TensorFloat-32, from now on in this process."""
    torch.set_float32_matmul_precision("high")


def exact_product(features: Tensor, directions: Tensor) -> Tensor:
    """Features (B, D) times directions (S, D) in full float32, also the gradients: (B, S)."""
    out: Tensor = torch.ops.shardprep.exact_product(features, directions)
    return out


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    with _exact():
        return a @ b.T


def _shape_of(a: Tensor, b: Tensor) -> Tensor:
    """What a compiler learns of the product: its shape, its dtype and its device."""
    return a.new_empty((a.shape[0], b.shape[0]))


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    a, b = ctx.saved_tensors
    return exact_product(grad, b.T), exact_product(grad.T, a.T)


_LIBRARY.impl("exact_product", _multiply, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("shardprep::exact_product", _shape_of, lib=_LIBRARY)
torch.library.register_autograd(
    "shardprep::exact_product", _gradients, setup_context=_keep, lib=_LIBRARY
)


@contextmanager
def _exact() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
