"""Muon for the matrices within a network, AdamW for its other weights, as one optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_MOMENTUM = 0.95


class MuonAdamW(torch.optim.Optimizer):
    """Moves matrices by the nearest orthogonal matrix to their momentum, the rest as AdamW does.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) is PyTorch's, its steps
    scaled to be as long as AdamW's (Liu et al. 2025, arXiv 2502.16982, section 2.2), so that one
    learning rate and one weight decay serve both. It computes in bfloat16 whatever the precision.
    A kernel of a convolution counts as a matrix of output channels by what each of them sees.

    Args:
        matrices: Weights of two dimensions or more for Muon.
        others: Weights for AdamW.
        lr: Learning rate.
        weight_decay: Decoupled weight decay, per step and unit of learning rate.
        fused: Whether AdamW runs as one kernel, and both heed `found_inf`.

    Attributes:
        found_inf: Scalar; where it is set to anything but 0, a step changes nothing. Unlike a
            branch on it, that need not wait for a GPU.
    """

    found_inf: Tensor

    def __init__(
        self,
        matrices: Iterable[Tensor],
        others: Iterable[Tensor],
        *,
        lr: float,
        weight_decay: float,
        fused: bool,
    ) -> None:
        rest = list(others)
        self._adamw = torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay, fused=fused)
        group = {"params": list(matrices), "lr": lr, "weight_decay": weight_decay}
        super().__init__([group, *self._adamw.param_groups], {"fused": fused})
        self._share()

    def _share(self) -> None:
        """Let the parts work on this optimiser's own groups and moments."""
        self._adamw.param_groups = self.param_groups[1:]
        self._adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` gave.

        Raises:
            ValueError: It is of other weights, or of another optimiser.
        """
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Change the weights by their gradients."""
        assert closure is None
        found: Tensor | None = getattr(self, "found_inf", None)
        if found is not None and found.device.type == "cpu":
            if found:
                return
            found = None
        self._adamw.found_inf = found  # type: ignore[attr-defined]
        self._adamw.step()
        self._move_matrices(found)

    @torch.no_grad()
    def _move_matrices(self, found: Tensor | None) -> None:
        group = self.param_groups[0]
        weights = [weight for weight in group["params"] if weight.grad is not None]
        views = [weight.detach().flatten(1) for weight in weights]
        for weight, view in zip(weights, views, strict=True):
            view.grad = weight.grad.flatten(1)
            if not self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(view)
        # Made anew, for the weights may have moved to a device, or their moments from a file.
        muon = torch.optim.Muon(
            views,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            momentum=_MOMENTUM,
            adjust_lr_fn="match_rms_adamw",
        )
        for weight, view in zip(weights, views, strict=True):
            muon.state[view] = self.state[weight]
        touched = [*views, *(self.state[weight]["momentum_buffer"] for weight in weights)]
        before = [] if found is None else [x.clone() for x in touched]
        muon.step()  # type: ignore[no-untyped-call]
        if found is not None:
            for x, old in zip(touched, before, strict=True):
                x.copy_(torch.where(found == 0, x, old))


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
