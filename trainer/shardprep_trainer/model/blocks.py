"""Encoder blocks: they map frames to frames, and a mask excludes padding.

`ConformerBlock` is the block of the `conformer` package, with the same weights, initialisation and
state_dict keys. Unlike there, the mask applies to attention, the depthwise convolution and
BatchNorm, and the memory of relative positions does not grow with T * T * d. `TransformerBlock` is
PyTorch's own layer with the same `forward(x, mask)`.

Axis legend: B batch, T frames, D model width, H heads. A mask is (B, T) bool, True on the frames
that are speech; None says that every frame is.
"""

from __future__ import annotations

import conformer
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardprep_trainer.model.layers import (
    Dropout,
    Linear,
    MaskedBatchNorm1d,
    SelfAttention,
    attend,
    convolve_depthwise,
    convolve_pointwise,
    zero_padding,
)

# Number of queries in one pass of attention. It bounds the relative scores to (B, H, QUERY_BLOCK,
# T + QUERY_BLOCK); a training segment of 128 frames needs one pass only.
QUERY_BLOCK = 256


def distance_rows(table: nn.Embedding, start: int, queries: int, keys: int) -> Tensor:
    """Rows of a relative position table for the queries start..start+queries-1 against all keys.

    Args:
        table: Embedding of 2 * reach + 1 distances (query minus key, in frames), clamped to reach.
        start: First query, in frames.
        queries: Number of queries.
        keys: Number of keys; they start at frame 0.

    Returns:
        (queries + keys, d): the distances descend from start + queries - 1, as `skew` needs them.
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
            that key j of row a is in column n - 1 - a + j. The last column is never read; with it,
            rows that are one element shorter still fit into the storage.
        keys: Number of keys.

    Returns:
        (..., n, keys) view of scores.
    """
    rows, width = scores.shape[-2:]
    shifted = scores.flatten(-2).narrow(-1, rows - 1, rows * (width - 1))
    return shifted.view(*scores.shape[:-1], width - 1)[..., :keys]


class ConformerBlock(conformer.ConformerBlock):  # type: ignore[misc]
    """The `conformer` package's block, batch-first and masked (Gulati et al. 2020, 2005.08100).

    Submodules, initial weights and state_dict keys are the package's, so that weights can be
    exchanged. The relative positions are the package's too (Shaw et al. 2018, arXiv 1803.02155; a
    table clamped at 512 frames), added to the scores of a fused attention.

    Args:
        dim: Model width D.
        dim_head: Width of one attention head.
        heads: Attention heads H.
        ff_mult: Feed-forward width in multiples of dim.
        conv_expansion_factor: Width of the convolution in multiples of dim.
        conv_kernel_size: Length of the depthwise convolution [frames], odd, so that it reaches
            equally far to both sides.
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
        for name in ("to_q", "to_kv", "to_out", "dropout"):
            setattr(self.attn.fn, name, _ours(getattr(self.attn.fn, name)))

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
        outputs = []
        for start in range(0, frames, QUERY_BLOCK):
            queries = q[:, :, start : start + QUERY_BLOCK]
            rows = distance_rows(attention.rel_pos_emb, start, queries.shape[2], frames)
            bias = skew(queries @ rows.to(q.dtype).T, frames)  # (B, H, n, T)
            if mask is not None:
                # A finite floor, not -inf: an utterance without any frame must not become NaN.
                floor = torch.finfo(bias.dtype).min
                bias = bias.masked_fill(~mask[:, None, None, :], floor)
            outputs.append(attend(queries, k, v, bias))
        joined = torch.cat(outputs, dim=2).transpose(1, 2).flatten(2)  # -> (B, T, H * d)
        out: Tensor = attention.dropout(attention.to_out(joined))
        return out

    def _convolve(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Convolution module: (B, T, D) -> (B, T, D); channels always come last."""
        norm, _, expand, _, depthwise, batch_norm, activation, project, _, dropout = self.conv.net
        x = F.glu(convolve_pointwise(norm(x), expand), dim=-1)  # (B, T, D) -> (B, T, C)
        # The convolution pads with zeros: put zeros beyond the end of an utterance too.
        x = convolve_depthwise(zero_padding(x, mask), depthwise.conv)
        x = batch_norm(x.transpose(1, 2), mask).transpose(1, 2)
        out: Tensor = dropout(convolve_pointwise(activation(x), project))
        return out


def _ours(layer: nn.Module) -> nn.Module:
    """Replace a layer of the package: the same function, masked or faster."""
    if isinstance(layer, nn.BatchNorm1d):
        return MaskedBatchNorm1d(layer.num_features, layer.eps, layer.momentum)
    if isinstance(layer, conformer.conformer.Swish):
        return nn.SiLU()
    if isinstance(layer, nn.Dropout):
        return Dropout(layer.p)
    if isinstance(layer, nn.Linear):
        # The same parameters, another way to compute.
        layer.__class__ = Linear
    return layer


class TransformerBlock(nn.Module):
    """PyTorch's Transformer encoder layer (Vaswani et al. 2017, 1706.03762), masked.

    Post-norm with ReLU; it knows nothing of the order of frames.

    Args:
        dim: Model width D.
        heads: Attention heads H; they divide dim.
        ff_dim: Feed-forward width.
        dropout: Dropout on attention weights and after each sublayer.
    """

    def __init__(self, *, dim: int, heads: int, ff_dim: int, dropout: float = 0.1) -> None:
        super().__init__()
        # Not F.relu, which computes the same but makes inference use PyTorch's "fast path". That
        # keeps all (B, H, T, T) scores in memory and is several times slower on a CPU.
        self.layer = nn.TransformerEncoderLayer(
            dim,
            heads,
            dim_feedforward=ff_dim,
            dropout=dropout,
            activation=torch.relu,
            batch_first=True,
        )
        self.layer.self_attn = SelfAttention(dim, heads, dropout=dropout, batch_first=True)
        for name in ("linear1", "linear2", "dropout", "dropout1", "dropout2"):
            setattr(self.layer, name, _ours(getattr(self.layer, name)))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode frames in their context.

        Args:
            x: (B, T, D). Padded frames may hold anything, NaN included.
            mask: (B, T) bool, True on valid frames; None for all.

        Returns:
            (B, T, D), zero on padded frames.
        """
        padding = None
        # The attention has a fast path too, which any padding mask switches off. It cannot reshape
        # a mask without elements.
        if len(x):
            padding = x.new_zeros(x.shape[:2], dtype=torch.bool) if mask is None else ~mask
        return zero_padding(self.layer(zero_padding(x, mask), src_key_padding_mask=padding), mask)
