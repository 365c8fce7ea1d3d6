"""Accuracy on whole utterances, each counted exactly once at any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Criterion = Callable[[Tensor, Tensor], Tensor]
Labels = NDArray[np.signedinteger[Any]]


@dataclass(frozen=True)
class Evaluation:
    """Counts over a split; ratios are made from them last, never averaged."""

    predictions: Labels
    """Class of each utterance (N,), in the split's own order."""
    correct: int
    labelled: int
    loss_sum: float
    """Sum over the labelled utterances; 0 without a criterion."""

    @property
    def accuracy(self) -> float:
        """Share of the labelled utterances that were recognised, 0 where none is labelled."""
        return self.correct / max(1, self.labelled)

    @property
    def loss(self) -> float:
        """Mean loss of the labelled utterances, 0 where none is labelled."""
        return self.loss_sum / max(1, self.labelled)


def model_inputs(batch: Mapping[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Move a batch to the device, in float32.

    Args:
        batch: `mel` (B, T, F), anywhere, and `length` (B,) on the CPU.
        device: Where the model is.

    Returns:
        mel (B, T, F) float32 and lengths (B,); None in their place where nothing is padded, which
        is known here without waiting for the device, and spares the model its mask.
    """
    mel, length = batch["mel"], batch["length"]
    padded = bool((length < mel.shape[1]).any())
    lengths = length.to(device, non_blocking=True) if padded else None
    return mel.to(device, non_blocking=True).float(), lengths


def on_one_process(total: Tensor) -> Tensor:
    """The sum over the ranks where there is only one."""
    return total


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    labels: Labels,
    *,
    device: torch.device,
    criterion: Criterion | None = None,
    reduce: Callable[[Tensor], Tensor] = on_one_process,
) -> Evaluation:
    """Classify every utterance of a split, whole.

    Args:
        model: Maps mel (B, T, F) and lengths (B,) to logits (B, S); left in the mode it was in.
        batches: This rank's part of the split: `mel`, `label`, `length`, and `index`, the
            utterance's position in the split. Ranks may have different numbers of batches.
        labels: Class of every utterance of the split (N,), -1 where unknown.
        device: Where the model is.
        criterion: Mean loss of logits (B, S) and labels (B,); None leaves the loss out.
        reduce: Sums a tensor over the ranks; called the same number of times on each.

    Returns:
        Counts over the whole split, equal on every rank.
    """
    # Adding up one-hot contributions gathers by index, whatever the order and number of batches.
    found = torch.zeros(2, len(labels), dtype=torch.int64, device=device)
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    training = model.training
    model.eval()
    try:
        for batch in batches:
            logits = model(*model_inputs(batch, device)).float()
            index = batch["index"].to(device, non_blocking=True)
            answers = torch.stack((logits.argmax(1), torch.ones_like(index)))
            found.index_add_(1, index, answers)
            if criterion is not None:
                loss_sum += _summed_loss(criterion, logits, batch["label"])
    finally:
        model.train(training)
    found, loss_sum = reduce(found), reduce(loss_sum)
    predictions, seen = found.cpu().numpy()
    assert (seen == 1).all(), "an utterance was evaluated twice or not at all"
    known = labels >= 0
    return Evaluation(
        predictions=predictions,
        correct=int((predictions[known] == labels[known]).sum()),
        labelled=int(known.sum()),
        loss_sum=loss_sum.item(),
    )


def _summed_loss(criterion: Criterion, logits: Tensor, labels: Tensor) -> Tensor:
    known = labels >= 0
    if not known.any():
        return logits.new_zeros(())
    rows = known.nonzero().squeeze(1)
    answers = labels[rows].to(logits.device, non_blocking=True)
    return criterion(logits[rows.to(logits.device, non_blocking=True)], answers) * len(rows)
