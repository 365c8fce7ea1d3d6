"""Losses over speakers, each a mean over the batch, computed in float32 at least.

Under autocast logits may arrive in half precision; they are converted first. The loss of an empty
batch is 0 and still has a gradient for every weight, so that a process whose last batch is empty
takes part in the exchange of gradients.

Axis legend: B batch, S speakers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SoftmaxLoss(nn.Module):
    """Cross-entropy of a softmax over speakers."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Score logits against labels.

        Args:
            logits: (B, S), without softmax or log.
            labels: (B,) int64 in 0..S-1.

        Returns:
            Scalar, in nats, the mean over the batch; 0 for an empty batch.

        Raises:
            ValueError: Shapes that do not fit, or labels on the CPU that are out of range.
        """
        _check(logits, labels)
        return _mean_cross_entropy(_at_least_float32(logits), labels)


class AMSoftmaxLoss(nn.Module):
    """Additive margin softmax (Wang et al. 2018, arXiv 1801.05599, equation 6).

    Cross-entropy of scale * (cos - margin) for the true speaker and scale * cos for the others.
    Only this loss knows the margin: predictions are made from plain cosines.

    Args:
        margin: Cosine by which the true speaker must lead; 0 or more.
        scale: Inverse temperature of the softmax, above 0.

    Attributes:
        margin: Scalar tensor on the device, so that compiled code need not be compiled anew as it
            grows: `loss.margin.fill_(0.1)`.

    Raises:
        ValueError: A negative margin or a scale that is not positive.
    """

    def __init__(self, margin: float = 0.2, scale: float = 30.0) -> None:
        super().__init__()
        if margin < 0:
            raise ValueError(f"margin: found {margin}; allowed: 0 or more")
        if scale <= 0:
            raise ValueError(f"scale: found {scale}; allowed: above 0")
        self.margin: Tensor
        self.register_buffer("margin", torch.tensor(margin, dtype=torch.float64), persistent=False)
        self.scale = scale

    def forward(self, cosines: Tensor, labels: Tensor) -> Tensor:
        """Score cosines against labels.

        Args:
            cosines: (B, S) cosines of embeddings and speaker weights, without margin or scale.
            labels: (B,) int64 in 0..S-1.

        Returns:
            Scalar, in nats, the mean over the batch; 0 for an empty batch.

        Raises:
            ValueError: Shapes that do not fit, or labels on the CPU that are out of range.
        """
        _check(cosines, labels)
        wide = _at_least_float32(cosines)
        return _mean_cross_entropy(self.scale * self._with_margin(wide, labels), labels)

    def _with_margin(self, cosines: Tensor, labels: Tensor) -> Tensor:
        true = labels.unsqueeze(1)  # (B, 1)
        margins = torch.zeros_like(cosines)
        return cosines - margins.scatter(1, true, self.margin.to(cosines.dtype).expand_as(true))


class AAMSoftmaxLoss(AMSoftmaxLoss):
    """Additive angular margin softmax (Deng et al. 2019, arXiv 1801.07698, equation 3).

    Cross-entropy of scale * cos(angle + margin) for the true speaker and scale * cos(angle) for the
    others. Beyond angle = pi - margin, where the cosine would rise again, the true speaker gets
    cos(angle) - margin * sin(margin), as in the authors' program.

    Args:
        margin: Angle by which the true speaker must lead [rad]; 0 or more.
        scale: Inverse temperature of the softmax, above 0.

    Raises:
        ValueError: A negative margin or a scale that is not positive.
    """

    def _with_margin(self, cosines: Tensor, labels: Tensor) -> Tensor:
        true = cosines.gather(1, labels.unsqueeze(1))  # (B, 1)
        # The slope of the sine is infinite at cosines of 1 and -1.
        sine = (1.0 - true.square()).clamp(min=1e-12).sqrt()
        cosine_of_margin, sine_of_margin = self.margin.cos(), self.margin.sin()
        moved = true * cosine_of_margin - sine * sine_of_margin
        straight = true - self.margin * sine_of_margin
        moved = torch.where(true > -cosine_of_margin, moved, straight)
        return cosines.scatter(1, labels.unsqueeze(1), moved)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over the batch; 0, not 0 / 0, for an empty batch."""
    return F.cross_entropy(logits, labels, reduction="sum") / max(len(labels), 1)


def _check(logits: Tensor, labels: Tensor) -> None:
    """Check shapes and labels, as far as the host need not wait for a device or a compiler."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        found = f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}"
        raise ValueError(f"{found} do not fit; pass logits (B, S) and labels (B,)")
    if labels.device.type != "cpu" or not len(labels) or torch.compiler.is_compiling():
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= logits.shape[1]:
        raise ValueError(
            f"labels run from {low} to {high}, but the model knows speakers "
            f"0 to {logits.shape[1] - 1}; is it built for the speakers of these shards?"
        )
