"""BatchNorm over the batches of all ranks, so that training does not depend on their number.

`torch.nn.SyncBatchNorm` knows neither masks nor CPUs. Axis legend: B batch, T frames, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardprep_trainer.model.layers import MaskedBatchNorm1d


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over all ranks; the gradient is summed over all ranks too.

    The loss of each rank depends on the tensors of all ranks. Data parallelism then averages the
    gradients over the ranks, which gives the gradient of the mean of their losses.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        total = own.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total


class SyncedBatchNorm1d(MaskedBatchNorm1d):
    """`MaskedBatchNorm1d` whose statistics in training are those of all ranks together.

    All ranks must call it equally often, if need be with an empty batch. A call costs two exchanges
    of C numbers forward and two backward.
    """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise x.

        Args:
            x: (B, C, T) or (B, C). In training, padded frames may hold anything.
            mask: (B, T) bool, True on valid frames; None for all.

        Returns:
            x normalised, of its shape and dtype. In training, padded frames become the bias.
        """
        frames = x.unsqueeze(2) if x.ndim == 2 else x  # (B, C) -> (B, C, 1)
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(frames, mask).view_as(x)
        return self.normalise(frames, mask).view_as(x)

    def total(self, sums: Tensor) -> Tensor:
        """The sums over the frames of all ranks, from those over the frames of this rank."""
        summed: Tensor = _SumOverRanks.apply(sums)  # type: ignore[no-untyped-call]
        return summed


def synchronise(model: nn.Module) -> None:
    """Make every BatchNorm1d of a model use the batches of all ranks.

    The new layers have the parameters, buffers and state_dict keys of the old ones.
    """
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.BatchNorm1d):
                synced = SyncedBatchNorm1d(layer.num_features, layer.eps, layer.momentum)
                synced.weight, synced.bias = layer.weight, layer.bias
                for key, buffer in layer.named_buffers():
                    setattr(synced, key, buffer)
                setattr(parent, name, synced)


def share_buffers(model: nn.Module) -> None:
    """Give every rank the running statistics of rank 0, so that all validate the same model."""
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)
