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
    """The sum of a tensor over all ranks; the gradient is summed over them just so.

    Each rank's loss depends on what every rank put in. Data parallelism then averages over the
    ranks, which makes it the gradient of the mean of their losses.
    """

    @staticmethod
    def forward(ctx: Any, mine: Tensor) -> Tensor:
        total = mine.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total


class SyncedBatchNorm1d(MaskedBatchNorm1d):
    """`MaskedBatchNorm1d` whose statistics in training are those of all ranks together.

    All ranks must call it equally often, be it with a batch without utterances. A call costs two
    exchanges of C numbers forward and two backward.
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
        """Sums over the frames of all ranks, of those over the frames of this one."""
        summed: Tensor = _SumOverRanks.apply(sums)  # type: ignore[no-untyped-call]
        return summed


def synchronise(model: nn.Module) -> None:
    """Let every BatchNorm1d of a model see the batches of all ranks.

    The layers are replaced by ones with the same parameters, buffers and state_dict keys.
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
    """Give every rank the running statistics of rank 0, so that all validate one model."""
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)
