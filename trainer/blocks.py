"""Encoder blocks: frames in, frames out, with a mask that keeps padding and batch-mates out.

`ConformerBlock` is the block of the `conformer` package with the same weights, initialisation and
state_dict keys, but batch-first masks that reach attention, the depthwise convolution and
BatchNorm, and relative positions whose memory does not grow with T * T * d. `TransformerBlock` is
PyTorch's own layer behind the same `forward(x, mask)`.

Axis legend: B batch, T frames, D model width, H heads. A mask is (B, T) bool, True on the frames
that are speech; None says that every frame is.
"""

from __future__ import annotations

from typing import Any

import conformer
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Queries attended at once. It bounds the relative scores to (B, H, QUERY_BLOCK, T + QUERY_BLOCK),
# and a training crop of 128 frames still takes a single pass.
QUERY_BLOCK = 256


def zero_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """Replace the padded frames of x (B, T, D) by zeros, whatever they held, NaN included.

    Filling differs from multiplying by the mask: 0 * NaN would stay NaN.
    """
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0.0)


def distance_rows(table: nn.Embedding, start: int, queries: int, keys: int) -> Tensor:
    """Rows of a relative position table for the queries start..start+queries-1 against all keys.

    Args:
        table: Embedding of 2 * reach + 1 distances (query minus key, in frames), clamped to reach.
        start: First query, in frames.
        queries: Number of queries.
        keys: Number of keys; they start at frame 0.

    Returns:
        (queries + keys, d): the distances descend from start + queries - 1, as `skew` wants them.
    """
    reach = table.num_embeddings // 2
    last = start + queries - 1
    distance = torch.arange(last, last - queries - keys, -1, device=table.weight.device)
    rows: Tensor = table(distance.clamp(-reach, reach) + reach)
    return rows


def skew(scores: Tensor, keys: int) -> Tensor:
    """View scores by distance as scores by key, without a copy.

    Args:
        scores: (..., n, n + keys), contiguous; the distance falls by one from column to column, so
            that key j of row a stands in column n - 1 - a + j. The last column is never read: it
            is there so that rows one element shorter still tile the storage.
        keys: Number of keys.

    Returns:
        (..., n, keys) view of scores.
    """
    rows, width = scores.shape[-2:]
    shifted = scores.flatten(-2).narrow(-1, rows - 1, rows * (width - 1))
    return shifted.view(*scores.shape[:-1], width - 1)[..., :keys]


class Dropout(nn.Dropout):
    """`nn.Dropout`, with `drop` in training on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Zero values of x, any shape, with probability p and scale up the others; in training."""
        native = x.device.type != "cpu" or torch.compiler.is_compiling()
        if not self.training or self.p == 0 or native:
            return super().forward(x)
        return drop(x, self.p)


def drop(x: Tensor, p: float) -> Tensor:
    """Dropout whose numbers are drawn four at a time, which halves its cost on a CPU.

    PyTorch's kernel for CPUs draws a 32-bit number a value, one after the other. Here a 64-bit
    number serves four values of 16 bits, so that p is kept to within 2**-16.
    """
    limit = min(round(p * 2**16), 2**16 - 1)
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    kept = draws.view(torch.int16)[: x.numel()].view(x.shape) >= limit - 2**15
    # One multiplication each way; the mask alone would be multiplied twice.
    return x * (kept.to(x.dtype) * (1.0 / (1.0 - limit / 2**16)))


class MaskedBatchNorm1d(nn.BatchNorm1d):
    """BatchNorm over (B, C, T) whose statistics count valid frames only.

    Same parameters, buffers and state_dict keys as `nn.BatchNorm1d` (Ioffe and Szegedy 2015, arXiv
    1502.03167), and the same result where no frame is padded. Statistics are at least float32
    whatever the input. Fewer than two valid frames give no variance: such a batch leaves the
    running statistics and `num_batches_tracked` as they were, so that an empty batch does no harm.

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
            (B, C, T) of the dtype of x. In training, padded frames become the bias.

        Raises:
            ValueError: In training with mask None, when B * T is 1.
        """
        if not self.training or (mask is None and x.numel()):
            # Frames in rows: twice as fast where channels lie next to one another in memory.
            rows = super().forward(x.transpose(1, 2).flatten(0, 1))  # (B * T, C)
            return rows.view(x.shape[0], x.shape[2], x.shape[1]).transpose(1, 2)
        if mask is None:
            mask = x.new_ones((x.shape[0], x.shape[2]), dtype=torch.bool)
        padding = ~mask.unsqueeze(1)  # (B, T) -> (B, 1, T)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        count = mask.sum().to(wide.dtype)
        frames = count.clamp(min=1)
        mean = wide.masked_fill(padding, 0.0).sum((0, 2), keepdim=True) / frames
        centred = (wide - mean).masked_fill(padding, 0.0)
        variance = centred.square().sum((0, 2)) / frames
        self._track(mean.detach().flatten(), variance.detach(), count)
        gain = self.weight * torch.rsqrt(variance + self.eps)
        return torch.addcmul(self.bias.unsqueeze(-1), centred, gain.unsqueeze(-1)).to(x.dtype)

    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Move the running statistics towards mean and variance (C,), of `count` frames (scalar).

        All decisions stay on the device: reading `count` on the host would wait for it.
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


class ConformerBlock(conformer.ConformerBlock):  # type: ignore[misc]
    """The `conformer` package's block, batch-first and masked (Gulati et al. 2020, 2005.08100).

    Submodules, initial weights and state_dict keys are the package's, so weights travel both ways.
    Relative positions after Shaw et al. 2018 (arXiv 1803.02155) as the package has them, a table
    clamped at 512 frames, are added to the scores of a fused attention.

    Args:
        dim: Model width D.
        dim_head: Width of one attention head.
        heads: Attention heads H.
        ff_mult: Feed-forward width in multiples of dim.
        conv_expansion_factor: Width of the convolution in multiples of dim.
        conv_kernel_size: Frames the depthwise convolution sees; odd, so that it looks equally far
            to both sides.
        attn_dropout: Dropout after attention.
        ff_dropout: Dropout in both feed-forward modules.
        conv_dropout: Dropout after the convolution.
    """

    def __init__(
        self,
        *,
        dim: int,
        dim_head: int = 64,
        heads: int = 8,
        ff_mult: int = 4,
        conv_expansion_factor: int = 2,
        conv_kernel_size: int = 31,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        conv_dropout: float = 0.0,
    ) -> None:
        super().__init__(
            dim=dim,
            dim_head=dim_head,
            heads=heads,
            ff_mult=ff_mult,
            conv_expansion_factor=conv_expansion_factor,
            conv_kernel_size=conv_kernel_size,
            attn_dropout=attn_dropout,
            ff_dropout=ff_dropout,
            conv_dropout=conv_dropout,
        )
        for sequence in (self.ff1.fn.fn.net, self.ff2.fn.fn.net, self.conv.net):
            for index, layer in enumerate(sequence):
                sequence[index] = _ours(layer)
        self.attn.fn.dropout = _ours(self.attn.fn.dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode frames in their context.

        Args:
            x: (B, T, D). Padded frames may hold anything, NaN included.
            mask: (B, T) bool, True on valid frames; None for all.

        Returns:
            (B, T, D), zero on padded frames.
        """
        x = zero_padding(x, mask)
        x = self.ff1(x) + x
        x = self._attend(self.attn.norm(x), mask) + x
        x = self._convolve(x, mask) + x
        x = self.ff2(x) + x
        return zero_padding(self.post_norm(x), mask)

    def _attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Self-attention with relative positions: (B, T, D) -> (B, T, D)."""
        attention = self.attn.fn
        projected = (attention.to_q(x) * attention.scale, *attention.to_kv(x).chunk(2, dim=-1))
        # (B, T, H * d) -> (B, H, T, d)
        q, k, v = (t.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for t in projected)
        frames = x.shape[1]
        parts = []
        for start in range(0, frames, QUERY_BLOCK):
            queries = q[:, :, start : start + QUERY_BLOCK]
            rows = distance_rows(attention.rel_pos_emb, start, queries.shape[2], frames)
            bias = skew(queries @ rows.to(q.dtype).T, frames)  # (B, H, n, T)
            if mask is not None:
                # A finite floor, not -inf: an utterance without any frame must not become NaN.
                floor = torch.finfo(bias.dtype).min
                bias = bias.masked_fill(~mask[:, None, None, :], floor)
            parts.append(attend(queries, k, v, bias))
        joined = torch.cat(parts, dim=2).transpose(1, 2).flatten(2)  # -> (B, T, H * d)
        out: Tensor = attention.dropout(attention.to_out(joined))
        return out

    def _convolve(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Convolution module: (B, T, D) -> (B, T, D), frames by channels all along."""
        norm, _, expand, _, depthwise, batch_norm, activation, project, _, dropout = self.conv.net
        x = F.glu(_pointwise(expand, norm(x)), dim=-1)  # (B, T, D) -> (B, T, C)
        # Beyond the end of an utterance must be the zeros that it sees when it is not padded.
        x = convolve_depthwise(zero_padding(x, mask), depthwise.conv)
        x = batch_norm(x.transpose(1, 2), mask).transpose(1, 2)
        out: Tensor = dropout(_pointwise(project, activation(x)))
        return out


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
    # PyTorch's fused kernel for CPUs gives no gradient to a bias; what it falls back on then takes
    # 1.1 (float32) to 2 times (bfloat16) as long as this. Nor does any fused kernel hand the bias
    # of an empty batch the gradient that data parallel training waits for.
    if not len(q) or (q.device.type == "cpu" and torch.is_grad_enabled()):
        scores = q @ k.transpose(-1, -2) + bias
        weights = torch.softmax(scores, -1, torch.promote_types(scores.dtype, torch.float32))
        return weights.to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)


def convolve_depthwise(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """Convolve every channel of x (B, T, C) with its own kernel, to the same number of frames.

    On a CPU this goes by way of a two-dimensional convolution of one row: oneDNN has no fast
    one-dimensional kernel for channels that lie next to one another (forward and backward of 32
    x 128 frames of 288 channels: 16 against 55 ms).
    """
    reach = conv.kernel_size[0] // 2
    if x.device.type != "cpu":
        same: Tensor = F.conv1d(
            x.transpose(1, 2), conv.weight, conv.bias, padding=reach, groups=conv.groups
        )
        return same.transpose(1, 2)
    row = x.transpose(1, 2).unsqueeze(2)  # (B, T, C) -> (B, C, 1, T), channels last in memory
    out = F.conv2d(row, conv.weight.unsqueeze(2), conv.bias, padding=(0, reach), groups=conv.groups)
    return out.squeeze(2).transpose(1, 2)


def _pointwise(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """A convolution of width 1, as the matrix product that it is: (B, T, in) -> (B, T, out)."""
    return F.linear(x, conv.weight.squeeze(-1), conv.bias)


def _ours(layer: nn.Module) -> nn.Module:
    """What stands in for a layer of the package: the same function, masked or faster."""
    if isinstance(layer, nn.BatchNorm1d):
        return MaskedBatchNorm1d(layer.num_features, layer.eps, layer.momentum)
    if isinstance(layer, conformer.conformer.Swish):
        return nn.SiLU()
    if isinstance(layer, nn.Dropout):
        return Dropout(layer.p)
    return layer


class SelfAttention(nn.MultiheadAttention):
    """PyTorch's self-attention, which on a CPU trains in half the time.

    There PyTorch has no fused kernel with dropout, and draws one number for each of the (B, H, T,
    T) weights. The result differs in these draws alone.
    """

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as `nn.MultiheadAttention` does with these arguments.

        Args:
            query: (B, T, D); key and value are the same tensor.
            key: See query.
            value: See query.
            options: `key_padding_mask` (B, T), added to the scores, and others, which are those of
                `nn.TransformerEncoderLayer`.

        Returns:
            (B, T, D), and None.
        """
        if not self.training or query.device.type != "cpu" or not len(query):
            found: tuple[Tensor, Tensor | None] = super().forward(query, key, value, **options)
            return found
        joined = F.linear(query, self.in_proj_weight, self.in_proj_bias)  # (B, T, 3 * D)
        q, k, v = (
            part.view(*part.shape[:2], self.num_heads, -1).transpose(1, 2)  # (B, H, T, d)
            for part in joined.chunk(3, dim=-1)
        )
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if (padding := options.get("key_padding_mask")) is not None:
            wide = wide + padding[:, None, None, :].clamp(min=torch.finfo(wide.dtype).min)
        weights = drop(torch.softmax(wide, -1).to(v.dtype), self.dropout)
        return self.out_proj((weights @ v).transpose(1, 2).flatten(2)), None


class TransformerBlock(nn.Module):
    """PyTorch's Transformer encoder layer (Vaswani et al. 2017, 1706.03762), masked.

    Post-norm with ReLU; it has no notion of the order of frames.

    Args:
        dim: Model width D.
        heads: Attention heads H; they divide dim.
        ff_dim: Feed-forward width.
        dropout: Dropout on attention weights and after each part.
    """

    def __init__(self, *, dim: int, heads: int, ff_dim: int, dropout: float = 0.1) -> None:
        super().__init__()
        # torch.relu is what F.relu computes, but only F.relu sends inference down PyTorch's "fast
        # path", which holds all (B, H, T, T) scores and, on a CPU, is several times slower.
        self.layer = nn.TransformerEncoderLayer(
            dim,
            heads,
            dim_feedforward=ff_dim,
            dropout=dropout,
            activation=torch.relu,
            batch_first=True,
        )
        self.layer.self_attn = SelfAttention(dim, heads, dropout=dropout, batch_first=True)
        for name in ("dropout", "dropout1", "dropout2"):
            setattr(self.layer, name, Dropout(dropout))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode frames in their context.

        Args:
            x: (B, T, D). Padded frames may hold anything, NaN included.
            mask: (B, T) bool, True on valid frames; None for all.

        Returns:
            (B, T, D), zero on padded frames.
        """
        padding = None
        # The attention inside has a fast path of its own, closed to it by any padding mask. A mask
        # without elements is one that it cannot reshape.
        if len(x):
            padding = x.new_zeros(x.shape[:2], dtype=torch.bool) if mask is None else ~mask
        return zero_padding(self.layer(zero_padding(x, mask), src_key_padding_mask=padding), mask)
