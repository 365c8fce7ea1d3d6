"""A SpeakerNetwork in a form that `torch.export` and `torch.jit.trace` can record for any B and T.

They record the computation of one example, so the model must not loop over frames or turn a size
into a Python number. Layers that do so compute in another way here; all else is the model's code.

Axis legend: B batch, T frames, F mel bins, D model width, H heads, d width of a head, P width of
the output of pooling, E embedding width, S speakers.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardprep_trainer.model.blocks import ConformerBlock, TransformerBlock
from shardprep_trainer.model.layers import zero_padding
from shardprep_trainer.model.model import Embedding, SpeakerNetwork


class TraceableConformerBlock(ConformerBlock):
    """A ConformerBlock whose attention takes all queries in one pass: a trace has no loops."""

    def _attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Self-attention with relative positions: (B, T, D) -> (B, T, D)."""
        attention, frames = self.attn.fn, x.shape[1]
        queries = _split_heads(attention.to_q(x) * attention.scale, attention.heads)
        keys, values = (
            _split_heads(part, attention.heads) for part in attention.to_kv(x).chunk(2, dim=-1)
        )
        table = attention.rel_pos_emb
        reach = table.num_embeddings // 2
        # Slices where `blocks.skew` makes a view: (B, H, T, 2T) by distance -> (B, H, T, T) by key.
        # No size is computed from T: with a trunk, T is a share of the mel frames, and the exporter
        # would take two times such a share for the share of two times the frames.
        later = torch.arange(frames, device=x.device)
        distance = torch.cat((later.flip(0), -1 - later))
        # Not table(...): ONNX would name the result "embedding", the name of an output.
        rows = table.weight.index_select(0, distance.clamp(-reach, reach) + reach)  # (2T, d)
        flat = (queries @ rows.T).flatten(2)[:, :, frames - 1 : -1]
        bias = flat.unflatten(2, (frames, -1))[..., :frames]
        joined = _attend(queries @ keys.transpose(2, 3) + bias, values, mask)
        out: Tensor = attention.to_out(joined)
        return out


class TraceableTransformerBlock(TransformerBlock):
    """A TransformerBlock by its formula: PyTorch's layer would record sizes as constants."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode frames in their context: (B, T, D) -> (B, T, D); see `TransformerBlock`."""
        layer, attention = self.layer, self.layer.self_attn
        x = zero_padding(x, mask)
        projected = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
        queries, keys, values = (
            _split_heads(part, attention.num_heads) for part in projected.chunk(3, dim=-1)
        )
        scores = queries * attention.head_dim**-0.5 @ keys.transpose(2, 3)
        x = layer.norm1(x + attention.out_proj(_attend(scores, values, mask)))
        x = layer.norm2(x + layer.linear2(torch.relu(layer.linear1(x))))
        return zero_padding(x, mask)


class TraceableEmbedding(Embedding):
    """An Embedding without the mask over the batch, which only training needs."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, P) to (B, E)."""
        out: Tensor = self.linear(self.norm(x.unsqueeze(2)).squeeze(2))
        return out


_TRACEABLE = {
    ConformerBlock: TraceableConformerBlock,
    TransformerBlock: TraceableTransformerBlock,
    Embedding: TraceableEmbedding,
}


def _split_heads(x: Tensor, heads: int) -> Tensor:
    # (B, T, H * d) -> (B, H, T, d)
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def _attend(scores: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Weigh values (B, H, T, d) by scores (B, H, T, T): -> (B, T, H * d)."""
    if mask is not None:
        floor = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask[:, None, None, :], floor)
    return (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)


class Traceable(nn.Module):
    """(mel, lengths) -> (embedding, logits), computed once for both, in eval mode.

    Args:
        model: Is copied; the model itself does not change.
    """

    def __init__(self, model: SpeakerNetwork) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        for module in self.model.modules():
            if type(module) in _TRACEABLE:
                # The same parameters, another way to compute: nothing needs to be built.
                module.__class__ = _TRACEABLE[type(module)]
        self.eval()

    def forward(self, mel: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, T, F) and (B,) to (B, E) and (B, S)."""
        embedding = self.model.embed(mel, lengths)
        return embedding, self.model.classifier(embedding).to(embedding.dtype)
