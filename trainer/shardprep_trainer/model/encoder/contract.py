"""What an encoder is: the contract between a speaker model and the network that sees its frames.

Ours keep it, and so must a class of yours that `model.encoder` names; `check_encoder` checks it.

    class Mine(nn.Module):
        subsampling = 1

        def __init__(self, n_mels: int, **options) -> None: ...
        def forward(self, mel: Tensor, mask: Tensor | None) -> Tensor: ...

**Construction.** `Mine(n_mels, **model.encoder_options)` draws its weights from torch's global
generator. It also works under `torch.device("meta")`, where tensors have no values: a model is
opened by comparing shapes first. So nothing there reads a value of a tensor, as `.item()` does.

**Attributes.** `width`, the width D of the output, and `subsampling`, how many frames of the input
make one of the output, 1 or more. Both are whole numbers.

**Input.** `mel` (B, T, F), B and T 1 or more, of the dtype of the weights. It is not to be changed
in place. `mask` (B, T) is bool, True on the valid frames, which come first in each row; None says
that all are valid, and is the same as a mask of True. The padded frames of `mel` are zeros.

**Output.** (B, ceil(T / subsampling), D), of any floating dtype, finite. Its valid frames are
`mask[:, ::subsampling]`. Its padded frames may hold any finite number: pooling leaves them out.

**Padding never counts.** In evaluation mode the valid frames of an utterance come out the same
alone, padded, and beside others. What mixes frames puts zeros beyond the end of an utterance, as
at the end of the matrix (`zero_padding`), and a mean over frames is one over valid frames.

**Training.** Every weight gets a gradient. Weights are contiguous in memory: the optimiser Muon
takes them as matrices. The module can be copied by `copy.deepcopy`. Under autocast it computes as
PyTorch's layers do. `MaskedBatchNorm1d` has statistics without padding, over all processes with
`train.sync_batchnorm`; PyTorch's own BatchNorm counts padded frames in training.

Axis legend: B batch, T frames, F mel bins, D width of the output.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Encoder(Protocol):
    """An `nn.Module` that keeps the contract above."""

    @property
    def width(self) -> int:
        """Width D of the output."""

    @property
    def subsampling(self) -> int:
        """Frames of the input for one of the output."""

    def __call__(self, mel: Tensor, mask: Tensor | None) -> Tensor:
        """Encode (B, T, F) as (B, ceil(T / subsampling), D)."""
