"""Muon's arithmetic: momenta side by side in memory, and their nearest orthogonal matrices.

Axis legend: N matrices of one shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from shardprep_trainer.model.cpu_kernels import is_slow_in_bfloat16

_MOMENTUM = 0.95
# Of the Newton-Schulz iteration x -> a x + (b x x' + c (x x')^2) x.
_ITERATIONS, _A, _B, _C = 5, 3.4445, -4.7750, 2.0315
_SMALLEST_NORM = 1e-7


class Momenta:
    """The momenta of matrices, those of one shape as one tensor, all in one piece of memory.

    So that nothing need be gathered or copied in a step: what is done to all numbers is done to the
    whole piece, and the iteration takes all matrices of one shape at once.

    Args:
        weights: Of two dimensions or more, contiguous, of one dtype, on their device. A kernel of a
            convolution counts as a matrix: one row for each output channel.

    Attributes:
        of_weights: For each weight its momentum (rows, columns), a view of the whole.
        directions: The function of this name, or the same compiled.
    """

    def __init__(self, weights: list[Tensor]) -> None:
        # Not flatten: it may copy, and then the weight itself would not change.
        matrices = [weight.detach().view(len(weight), -1) for weight in weights]
        by_shape: dict[torch.Size, list[int]] = {}
        for number, matrix in enumerate(matrices):
            by_shape.setdefault(matrix.shape, []).append(number)
        self._shapes = [(len(numbers), *shape) for shape, numbers in by_shape.items()]
        self._order = [number for numbers in by_shape.values() for number in numbers]
        self._matrices = [matrices[number] for number in self._order]
        sizes = sum(matrix.numel() for matrix in matrices)
        self._whole = torch.zeros(sizes, dtype=weights[0].dtype, device=weights[0].device)
        self._narrow = narrow_type(self._whole.device)
        self.directions: Callable[[list[Tensor], torch.dtype], list[Tensor]] = directions
        views = self._each(self._stacks(self._whole))
        self.of_weights = [view for _, view in sorted(zip(self._order, views, strict=True))]

    def _stacks(self, whole: Tensor) -> list[Tensor]:
        """A piece of memory as one tensor (N, rows, columns) for each shape."""
        parts = torch.split(whole, [math.prod(shape) for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def _each(self, stacks: list[Tensor]) -> list[Tensor]:
        """The matrices of the stacks, in the order of `self._order`."""
        return [matrix for stack in stacks for matrix in stack.unbind()]

    @torch.no_grad()
    def move(self, gradients: list[Tensor], rate: float, decay: float, skip: Tensor | None) -> None:
        """Move the weights.

        Args:
            gradients: Of the weights, in their order and shapes.
            rate: Learning rate.
            decay: Decoupled weight decay, per step and unit of learning rate.
            skip: A scalar; other than 0 it makes the step change nothing. None for 0.
        """
        found = [gradients[number].flatten(1) for number in self._order]
        whole = self._whole * _MOMENTUM
        stacks = self._stacks(whole)
        steps = self._each(stacks)
        torch._foreach_add_(steps, found, alpha=1 - _MOMENTUM)
        skipped = None if skip is None else skip != 0
        self._whole.copy_(whole if skipped is None else torch.where(skipped, self._whole, whole))
        # Nesterov momentum: the gradient moves on towards the new momentum.
        whole.mul_(_MOMENTUM)
        torch._foreach_add_(steps, found, alpha=1 - _MOMENTUM)
        torch._foreach_copy_(stacks, self.directions(stacks, self._narrow))
        whole.mul_(-rate)
        kept = 1 - rate * decay
        if skipped is None:
            torch._foreach_mul_(self._matrices, kept)
        else:
            whole.masked_fill_(skipped, 0.0)
            torch._foreach_mul_(self._matrices, torch.where(skipped, 1.0, kept).to(whole.dtype))
        torch._foreach_add_(self._matrices, steps)


def directions(stacks: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Where matrices move to, as far as AdamW would: each (N, rows, columns), contiguous.

    Args:
        stacks: Their momenta, each (N, rows, columns).
        dtype: The type to compute in.
    """
    found = []
    for stack in stacks:
        step = orthogonalise(stack, dtype).to(stack.dtype, memory_format=torch.contiguous_format)
        found.append(step.mul_(0.2 * math.sqrt(max(stack.shape[1:]))))
    return found


def orthogonalise(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The nearest orthogonal matrices, roughly: all singular values end between .7 and 1.2.

    Five Newton-Schulz iterations with the polynomial of Jordan et al. (2024), which is steep at 0.

    Args:
        x: (N, rows, columns).
        dtype: The type to compute in; by default bfloat16, or float32 on a CPU where bfloat16
            is slow, or float16 on a GPU that has no bfloat16.

    Returns:
        (N, rows, columns) of this type.
    """
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    dtype = narrow_type(x.device) if dtype is None else dtype
    if dtype is torch.float16:
        # Momenta may be smaller than the numbers of float16.
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=_SMALLEST_NORM)
    x = x.to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=_SMALLEST_NORM)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if tall else x


def narrow_type(device: torch.device) -> torch.dtype:
    """The type for products of matrices on a device."""
    if device.type == "cpu" and is_slow_in_bfloat16():
        return torch.float32
    # A T4 multiplies float16 8 times as fast as float32, and has no bfloat16 at all: PyTorch
    # imitates it, and TorchInductor does not compile it.
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float16
    return torch.bfloat16
