"""Muon for the matrices within a network, AdamW for its other weights, as one optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from shardprep_trainer.learning.compilation import Compilation
from shardprep_trainer.learning.muon import Momenta


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
        self._momenta: Momenta | None = None
        self._gathered: list[int] = []

    def compile(self, compilation: Compilation, warn: Callable[[str], None]) -> None:
        """Compile the iteration of Muon; the rest takes few kernels as it is."""
        momenta = self._gather(self.param_groups[0]["params"])
        momenta.directions = compilation.function(momenta.directions, warn)

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Change the weights by their gradients; a gradient scaler must have unscaled these.

        Weights without a gradient stay as they are.
        """
        assert closure is None
        assert getattr(self, "grad_scale", None) is None
        found: Tensor | None = getattr(self, "found_inf", None)
        # A scaler may set more than 1, one for each device; AdamW skips at 1 only.
        skip = None if found is None else (found != 0).float()
        self._adamw.found_inf = skip  # type: ignore[attr-defined]
        self._adamw.step()
        group = self.param_groups[0]
        matrices = [weight for weight in group["params"] if weight.grad is not None]
        if not matrices:
            return
        gradients = [weight.grad for weight in matrices if weight.grad is not None]
        self._gather(matrices).move(gradients, group["lr"], group["weight_decay"], skip)

    def _gather(self, matrices: list[Tensor]) -> Momenta:
        """The momenta of matrices, which are the state of these."""
        numbers = [id(weight) for weight in matrices]
        if self._momenta is None or numbers != self._gathered:
            self._momenta, self._gathered = Momenta(matrices), numbers
            for weight, momentum in zip(matrices, self._momenta.of_weights, strict=True):
                if "momentum_buffer" in self.state[weight]:
                    momentum.copy_(self.state[weight]["momentum_buffer"])
                self.state[weight]["momentum_buffer"] = momentum
        return self._momenta


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
