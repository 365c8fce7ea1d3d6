"""An encoder as a user writes one, in a module of the user's own: a small TDNN."""

from __future__ import annotations

from torch import Tensor, nn

from shardprep_trainer.model.layers import MaskedBatchNorm1d, zero_padding


class Tdnn(nn.Module):
    """Dilated convolutions over frames (Peddinti et al. 2015), at half the rate of the frames."""

    subsampling = 2

    def __init__(self, n_mels: int, width: int = 24, dilations: tuple[int, ...] = (1, 2)) -> None:
        super().__init__()
        self.width = width
        self.first = nn.Conv1d(n_mels, width, 3, stride=2, padding=1)
        self.layers = nn.ModuleList(
            nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)
            for dilation in dilations
        )
        self.norms = nn.ModuleList(MaskedBatchNorm1d(width) for _ in dilations)

    def forward(self, mel: Tensor, mask: Tensor | None) -> Tensor:
        """Map (B, T, F) to (B, ceil(T / 2), width)."""
        x = self.first(mel.transpose(1, 2)).relu()
        mask = None if mask is None else mask[:, ::2]
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = zero_padding(x.transpose(1, 2), mask).transpose(1, 2)
            x = x + norm(layer(x).relu(), mask)
        return x.transpose(1, 2)
