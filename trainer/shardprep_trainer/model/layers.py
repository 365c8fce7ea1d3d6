"""Layers of the encoder blocks: PyTorch's, but masked where they mix frames, or faster on CPUs.

Parameters and state_dict keys are those of the layers that they replace.

Axis legend: B batch, T frames, D model width, C channels, H heads, d head width. A mask is (B, T)
bool, True on the frames that are speech; None says that every frame is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardprep_trainer.model import cpu_kernels as cpu


def zero_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """Replace the padded frames of x (B, T, D) by zeros, NaN included.

    To multiply by the mask would not do: 0 * NaN is NaN.
    """
    if mask is None:
        return x
    if cpu.applies_to(x):
        # A third to a sixth of the time of `masked_fill`.
        rows = (~mask).flatten().nonzero().squeeze(1)
        return x.flatten(0, 1).index_fill(0, rows, 0.0).view(x.shape)
    return x.masked_fill(~mask.unsqueeze(-1), 0.0)


def frame_mask(lengths: Tensor | None, frames: int) -> Tensor | None:
    """Which frames are valid: lengths (B,) to (B, T) bool on their device; None stays None."""
    if lengths is None:
        return None
    return torch.arange(frames, device=lengths.device) < lengths.unsqueeze(1)


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over valid frames of x (B, T, D): (B, 1, D), zeros if there is no valid frame."""
    if mask is None:
        return x.mean(1, keepdim=True)
    return zero_padding(x, mask).sum(1, keepdim=True) / mask.sum(1).clamp(min=1).view(-1, 1, 1)


class Linear(nn.Linear):
    """`nn.Linear` by `cpu.multiply`."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, T, in) to (B, T, out)."""
        return cpu.multiply(x, self.weight, self.bias)


class Dropout(nn.Dropout):
    """`nn.Dropout`, by `cpu.drop` in training on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Zero values of x, any shape, with probability p and scale up the others; in training."""
        if not self.training or not cpu.applies_to(x):
            return super().forward(x)
        return cpu.drop(x, self.p)


class MaskedBatchNorm1d(nn.BatchNorm1d):
    """BatchNorm over (B, C, T) whose statistics count valid frames only.

    Same parameters, buffers and state_dict keys as `nn.BatchNorm1d` (Ioffe and Szegedy 2015, arXiv
    1502.03167), and the same result if no frame is padded. Statistics are in float32 at least,
    whatever the dtype of the input. Fewer than two valid frames have no variance: such a batch, an
    empty one for example, changes neither running statistics nor `num_batches_tracked`.

    Under data parallelism each process normalises by the statistics of its own part of the batch.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise x.

        Args:
            x: (B, C, T). In training, padded frames may hold anything.
            mask: (B, T) bool, True on valid frames; None for all.

        Returns:
            (B, C, T) of the dtype of x. In training, padded frames become some finite number.

        Raises:
            ValueError: In training with mask None, when B * T is 1.
        """
        if not self.training or (mask is None and x.numel()):
            # Frames as rows: twice as fast if the channels of a frame are adjacent in memory.
            return _as_channels(super().forward(_as_rows(x)), x)
        if mask is not None and cpu.applies_to(x):
            valid = mask.flatten().nonzero().squeeze(1)
            if len(valid) > 1:
                rows = _as_rows(x)
                found = super().forward(rows.index_select(0, valid))
                return _as_channels(torch.zeros_like(rows).index_copy(0, valid, found), x)
        return self.normalise(x, mask)

    def normalise(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """`forward` in training, from the sums over valid frames that `total` returns.

        Padded frames become the bias.
        """
        if mask is None:
            mask = x.new_ones((x.shape[0], x.shape[2]), dtype=torch.bool)
        padding = ~mask.unsqueeze(1)  # (B, T) -> (B, 1, T)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        sums = wide.masked_fill(padding, 0.0).sum((0, 2))
        number = mask.sum().to(wide.dtype).unsqueeze(0)
        sums, count = self.total(torch.cat([sums, number])).tensor_split([len(sums)])
        count = count.detach().squeeze(0)
        mean = sums / count.clamp(min=1)
        centred = (wide - mean.unsqueeze(-1)).masked_fill(padding, 0.0)
        variance = self.total(centred.square().sum((0, 2))) / count.clamp(min=1)
        self._track(mean.detach(), variance.detach(), count)
        gain = self.weight * torch.rsqrt(variance + self.eps)
        return torch.addcmul(self.bias.unsqueeze(-1), centred, gain.unsqueeze(-1)).to(x.dtype)

    def total(self, sums: Tensor) -> Tensor:
        """The sums over all frames, from those over this process's frames: here the same."""
        return sums

    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Move the running statistics towards mean and variance (C,), of `count` frames (scalar).

        All decisions stay on the device: the host would have to wait to read `count`.
        """
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        enough = (count > 1).to(count.dtype)
        self.num_batches_tracked.add_(count > 1)
        if self.momentum is None:
            rate = enough / self.num_batches_tracked.clamp(min=1)
        else:
            rate = enough * self.momentum
        unbiased = variance * (count / (count - 1).clamp(min=1))
        for running, seen in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.lerp_(seen.to(running.dtype), rate.to(running.dtype))


def _as_rows(x: Tensor) -> Tensor:
    # (B, C, T) -> (B * T, C)
    return x.transpose(1, 2).flatten(0, 1)


def _as_channels(rows: Tensor, x: Tensor) -> Tensor:
    # (B * T, C) -> (B, C, T), the shape of x
    return rows.view(x.shape[0], x.shape[2], x.shape[1]).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attention with an additive bias, its softmax in float32 at least.

    Args:
        q: (B, H, n, d) queries, scaled.
        k: (B, H, T, d) keys.
        v: (B, H, T, d) values.
        bias: (B, H, n, T), added to the scores.

    Returns:
        (B, H, n, d).
    """
    # PyTorch's fused kernel for CPUs computes no gradient of a bias; its fallback takes 1.1
    # (float32) to 2 times (bfloat16) as long as these lines. And for an empty batch no fused kernel
    # computes a gradient of the bias, for which data parallel training would wait.
    if not len(q) or (q.device.type == "cpu" and torch.is_grad_enabled()):
        scores = q @ k.transpose(-1, -2) + bias
        weights = torch.softmax(scores, -1, torch.promote_types(scores.dtype, torch.float32))
        return weights.to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)


class SelfAttention(nn.MultiheadAttention):
    """PyTorch's self-attention, in half the time when training on a CPU.

    On CPUs PyTorch has no fused kernel with dropout, and draws a number for each of the (B, H, T,
    T) weights. Here the draws are others, and faster; nothing else differs.
    """

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as `nn.MultiheadAttention` does with these arguments.

        Args:
            query: (B, T, D); key and value are the same tensor.
            key: See query.
            value: See query.
            options: `key_padding_mask` (B, T), added to the scores, and the other options that
                `nn.TransformerEncoderLayer` passes.

        Returns:
            (B, T, D), and None.
        """
        if not self.training or not cpu.applies_to(query) or not len(query):
            found: tuple[Tensor, Tensor | None] = super().forward(query, key, value, **options)
            return found
        joined = cpu.multiply(query, self.in_proj_weight, self.in_proj_bias)  # (B, T, 3 * D)
        q, k, v = (
            part.view(*part.shape[:2], self.num_heads, -1).transpose(1, 2)  # (B, H, T, d)
            for part in joined.chunk(3, dim=-1)
        )
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if (padding := options.get("key_padding_mask")) is not None:
            bias = padding[:, None, None, :].to(wide.dtype)
            wide = wide + bias.clamp(min=torch.finfo(wide.dtype).min)
        weights = cpu.drop(torch.softmax(wide, -1).to(v.dtype), self.dropout)
        return self.out_proj((weights @ v).transpose(1, 2).flatten(2)), None


def convolve_depthwise(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """Convolve every channel of x (B, T, C) with its own kernel, to the same number of frames."""
    weight, bias = conv.weight, conv.bias
    assert bias is not None
    if x.device.type == "cpu":
        return cpu.convolve_depthwise(x, weight, bias)
    reach = conv.kernel_size[0] // 2
    same: Tensor = F.conv1d(x.transpose(1, 2), weight, bias, padding=reach, groups=conv.groups)
    return same.transpose(1, 2)


def convolve_pointwise(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """A convolution of width 1, computed as a matrix product: (B, T, in) -> (B, T, out)."""
    return cpu.multiply(x, conv.weight.squeeze(-1), conv.bias)
