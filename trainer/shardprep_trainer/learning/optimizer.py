"""Muon for the matrices within a network, AdamW for its other weights, as one optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from shardprep_trainer.model.cpu_kernels import is_slow_in_bfloat16

_MOMENTUM = 0.95
# Of the Newton-Schulz iteration x -> a x + (b x x' + c (x x')^2) x.
_ITERATIONS, _A, _B, _C = 5, 3.4445, -4.7750, 2.0315
_SMALLEST_NORM = 1e-7


class MuonAdamW(torch.optim.Optimizer):
    """Moves matrices by the nearest orthogonal matrix to their momentum, the rest as AdamW does.

    Muon is from Jordan et al. (2024, https://kellerjordan.github.io/posts/muon). Its steps are
    scaled to the length of AdamW's (Liu et al. 2025, arXiv 2502.16982, section 2.2), so that both
    share one learning rate and one weight decay. The kernel of a convolution counts as a matrix:
    one row for each output channel. PyTorch's own Muon does the same, but takes one matrix at a
    time and always computes in bfloat16: on a CPU without AVX-512 this takes longer than the rest
    of the step. Devices of different kinds round differently, so all processes of a run must use
    the same kind.

    Args:
        matrices: Weights of two dimensions or more for Muon, contiguous.
        others: Weights for AdamW.
        lr: Learning rate.
        weight_decay: Decoupled weight decay, per step and unit of learning rate.
        fused: Whether AdamW runs as one kernel, and both obey `found_inf`.

    Attributes:
        found_inf: If set, a scalar on the device of the weights. A value other than 0 makes the
            step change nothing; the host need not wait for the device to know the value.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        others: Iterable[Tensor],
        *,
        lr: float,
        weight_decay: float,
        fused: bool,
    ) -> None:
        adamw = torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay, fused=fused)
        group = {"params": list(matrices), "lr": lr, "weight_decay": weight_decay}
        super().__init__([group, *adamw.param_groups], {"fused": fused})
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        """Let AdamW use the second group and the state of this optimiser."""
        group = self.param_groups[1]
        # Tells a gradient scaler to set `found_inf` and not to wait for its value.
        self._step_supports_amp_scaling = group["fused"]
        self._adamw = torch.optim.AdamW(group["params"], fused=group["fused"])
        state = {"state": self.state, "param_groups": [group]}
        self._adamw.__setstate__(state)  # type: ignore[no-untyped-call]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Change the weights by their gradients; a gradient scaler must have unscaled these."""
        assert closure is None
        assert getattr(self, "grad_scale", None) is None
        found: Tensor | None = getattr(self, "found_inf", None)
        # A scaler may set more than 1, one for each device; AdamW skips at 1 only.
        skip = None if found is None else (found != 0).float()
        self._adamw.found_inf = skip  # type: ignore[attr-defined]
        self._adamw.step()
        self._move_matrices(skip)

    @torch.no_grad()
    def _move_matrices(self, skip: Tensor | None) -> None:
        group = self.param_groups[0]
        lr = group["lr"]
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor, Tensor]]] = {}
        for weight in group["params"]:
            if weight.grad is not None:
                # Not flatten: it may copy, and then the weight itself would not change.
                matrix = weight.detach().view(len(weight), -1)
                if not self.state[weight]:
                    self.state[weight]["momentum_buffer"] = torch.zeros_like(matrix)
                entry = matrix, weight.grad.flatten(1), self.state[weight]["momentum_buffer"]
                by_shape.setdefault(matrix.shape, []).append(entry)
        for shape, entries in by_shape.items():
            matrices, gradients, momenta = (torch.stack(x) for x in zip(*entries, strict=True))
            momenta.lerp_(gradients, 1 - _MOMENTUM)
            # Nesterov momentum: the gradient moves on towards the new momentum.
            steps = orthogonalise(gradients.lerp_(momenta, _MOMENTUM)).to(matrices.dtype)
            matrices.mul_(1 - lr * group["weight_decay"])
            matrices.add_(steps, alpha=-lr * 0.2 * math.sqrt(max(shape)))
            for (matrix, _, momentum), *new in zip(entries, matrices, momenta, strict=True):
                for old, x in zip((matrix, momentum), new, strict=True):
                    old.copy_(x if skip is None else torch.where(skip == 0, x, old))


def orthogonalise(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The nearest orthogonal matrices, roughly: all singular values end between .7 and 1.2.

    Five Newton-Schulz iterations with the polynomial of Jordan et al. (2024), which is steep at 0.

    Args:
        x: (N, rows, columns).
        dtype: The type to compute in; by default bfloat16, or float32 on a CPU where bfloat16
            is slow.

    Returns:
        (N, rows, columns) of this type.
    """
    tall = x.shape[1] > x.shape[2]
    if dtype is None:
        dtype = torch.float32 if x.is_cpu and is_slow_in_bfloat16() else torch.bfloat16
    x = (x.mT if tall else x).to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=_SMALLEST_NORM)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if tall else x


def split_weights(model: nn.Module, head: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Split the weights of a model into those for Muon and those for AdamW.

    AdamW gets vectors, the tables of an `nn.Embedding`, the kernels of convolutions in groups
    (each of them is a vector), and all weights of the head, whose rows are classes.

    Args:
        model: The whole model.
        head: Its last layer.

    Returns:
        The matrices for Muon, and the other weights.
    """
    apart = set(head.parameters())
    for module in model.modules():
        grouped = isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups > 1
        if grouped or isinstance(module, nn.Embedding):
            apart.update(module.parameters(recurse=False))
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for weight in model.parameters():
        inner = weight not in apart and weight.ndim >= 2 and min(weight.flatten(1).shape) > 1
        (matrices if inner else others).append(weight)
    return matrices, others
