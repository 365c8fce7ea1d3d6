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

    Muon is that of Jordan et al. (2024, https://kellerjordan.github.io/posts/muon), its steps
    scaled to be as long as AdamW's (Liu et al. 2025, arXiv 2502.16982, section 2.2), so that one
    learning rate and one weight decay serve both. A kernel of a convolution counts as a matrix of
    output channels by what each of them sees. PyTorch's own Muon does the same, a matrix at a time
    and in bfloat16 everywhere, which takes longer than all the rest of a step on a CPU without
    AVX-512. Devices of different kinds round differently: processes that share a model must run on
    the same kind.

    Args:
        matrices: Weights of two dimensions or more for Muon, contiguous.
        others: Weights for AdamW.
        lr: Learning rate.
        weight_decay: Decoupled weight decay, per step and unit of learning rate.
        fused: Whether AdamW runs as one kernel, and both heed `found_inf`.

    Attributes:
        found_inf: If it is set, a scalar on the device of the weights; where it is not 0, a step
            changes nothing. Unlike a branch on it, that need not wait for the device.
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
        """Let AdamW work on this optimiser's own group and moments."""
        group = self.param_groups[1]
        # A gradient scaler passes its `found_inf` on rather than waiting for it.
        self._step_supports_amp_scaling = group["fused"]
        self._adamw = torch.optim.AdamW(group["params"], fused=group["fused"])
        state = {"state": self.state, "param_groups": [group]}
        self._adamw.__setstate__(state)  # type: ignore[no-untyped-call]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Change the weights by their gradients, which a gradient scaler has unscaled."""
        assert closure is None
        assert getattr(self, "grad_scale", None) is None
        found: Tensor | None = getattr(self, "found_inf", None)
        # A scaler counts devices, and AdamW heeds 1 alone.
        skip = None if found is None else (found != 0).float()
        self._adamw.found_inf = skip  # type: ignore[attr-defined]
        self._adamw.step()
        self._move_matrices(skip)

    @torch.no_grad()
    def _move_matrices(self, skip: Tensor | None) -> None:
        group = self.param_groups[0]
        lr = group["lr"]
        alike: dict[torch.Size, list[tuple[Tensor, Tensor, Tensor]]] = {}
        for weight in group["params"]:
            if weight.grad is not None:
                # Not flatten, which copies what is not contiguous: the weight itself would stay.
                matrix = weight.detach().view(len(weight), -1)
                if not self.state[weight]:
                    self.state[weight]["momentum_buffer"] = torch.zeros_like(matrix)
                parts = matrix, weight.grad.flatten(1), self.state[weight]["momentum_buffer"]
                alike.setdefault(matrix.shape, []).append(parts)
        for shape, parts_of in alike.items():
            matrices, gradients, momenta = (torch.stack(x) for x in zip(*parts_of, strict=True))
            momenta.lerp_(gradients, 1 - _MOMENTUM)
            # Nesterov's, with the momentum that the next step begins with.
            steps = orthogonalise(gradients.lerp_(momenta, _MOMENTUM)).to(matrices.dtype)
            matrices.mul_(1 - lr * group["weight_decay"])
            matrices.add_(steps, alpha=-lr * 0.2 * math.sqrt(max(shape)))
            for (matrix, _, momentum), *new in zip(parts_of, matrices, momenta, strict=True):
                for old, x in zip((matrix, momentum), new, strict=True):
                    old.copy_(x if skip is None else torch.where(skip == 0, x, old))


def orthogonalise(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The nearest orthogonal matrices, roughly: singular values come to lie between .7 and 1.2.

    Five Newton-Schulz iterations of Jordan et al. (2024), whose polynomial is steep at 0.

    Args:
        x: (N, rows, columns).
        dtype: To compute in; by default bfloat16, or float32 on a CPU that is slow in that.

    Returns:
        (N, rows, columns) of that type.
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
    """Which weights of a model are matrices to Muon, and which are not.

    The latter are vectors, the tables of an `nn.Embedding`, the kernels of convolutions in groups,
    each of which is a vector, and all of the head, whose rows are classes.

    Args:
        model: All of it.
        head: Its last layer.
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
