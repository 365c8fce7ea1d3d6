"""Augmentation of log-mel segments on the training device: other rooms, channels and noises.

A speaker is recorded in few situations and must be recognised in others. Augmentation makes
segments sound as if they were recorded elsewhere. It works on the mels as they are stored, natural
logarithms of power: a channel's filter adds a curve over the bins, and two sounds together are
`logaddexp`. Random numbers come from torch's generator of the device, which the training step
seeds.

Axis legend: B batch, T frames, F mel bins. A mask is (B, T) bool, True on valid frames.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardprep_trainer.model.layers import frame_mask, masked_mean

_NEPERS_PER_DECIBEL = math.log(10.0) / 10.0
# Standard deviation of the log-mels of stationary noise, about: a mel is a mean over few FFT bins.
_NOISE_DEVIATION = 0.8
_FRAME_SECONDS = 0.01
# Length of the reverberation; what comes later is left out.
_TAIL_FRAMES = 40


class Augment(nn.Module):
    """Changes each segment of a batch at random, and nothing if all shares are 0.

    The order is: room, channel, other voices, noise, SpecAugment.

    Args:
        reverb: Share of the segments that get the reverberation of a room.
        reverb_seconds: Shortest and longest reverberation time, a fall of 60 dB [s].
        channel: Standard deviation of a smooth curve over mel bins that is added [nepers of power].
        channel_points: Points between which the curve is interpolated.
        babble: Share of the segments that get the sum of one to three other segments of the batch.
        babble_snr: Lowest and highest ratio of their powers [dB].
        noise: Share of the segments that get noise with a smooth spectrum.
        noise_snr: Lowest and highest ratio of the powers [dB].
        time_masks: Spans of frames that SpecAugment hides (Park et al. 2019, arXiv 1904.08779).
        time_width: Longest of them [frames].
        freq_masks: Spans of mel bins that SpecAugment hides.
        freq_width: Longest of them [bins].
    """

    def __init__(
        self,
        *,
        reverb: float = 0.0,
        reverb_seconds: tuple[float, float] = (0.1, 0.8),
        channel: float = 0.0,
        channel_points: int = 6,
        babble: float = 0.0,
        babble_snr: tuple[float, float] = (5.0, 20.0),
        noise: float = 0.0,
        noise_snr: tuple[float, float] = (5.0, 20.0),
        time_masks: int = 0,
        time_width: int = 10,
        freq_masks: int = 0,
        freq_width: int = 6,
    ) -> None:
        super().__init__()
        self.reverb = reverb
        self.reverb_seconds = reverb_seconds
        self.channel = channel
        self.channel_points = channel_points
        self.babble = babble
        self.babble_snr = babble_snr
        self.noise = noise
        self.noise_snr = noise_snr
        self.time_masks = time_masks
        self.time_width = time_width
        self.freq_masks = freq_masks
        self.freq_width = freq_width

    @torch.no_grad()
    def forward(self, mel: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Augment a batch; in evaluation mode return it unchanged.

        Args:
            mel: (B, T, F) float32 natural logs of power; not changed in place.
            lengths: (B,) valid frames of each segment on the device of mel, None for all T.

        Returns:
            (B, T, F) float32. Frames beyond `lengths` hold anything.
        """
        if not self.training or not len(mel):
            return mel
        mask = frame_mask(lengths, mel.shape[1])
        if self.reverb:
            room = reverberate(mel, _between(mel, self.reverb_seconds))
            mel = torch.where(_chosen(mel, self.reverb), room, mel)
        if self.channel:
            mel = mel + self.channel * smooth_curve(mel, self.channel_points)
        if self.babble:
            mel = self._mix(mel, _voices(mel), self.babble, self.babble_snr, mask)
        if self.noise:
            spectrum = 2.0 * smooth_curve(mel, self.channel_points)
            sound = spectrum + _NOISE_DEVIATION * torch.randn_like(mel)
            mel = self._mix(mel, sound, self.noise, self.noise_snr, mask)
        return self._hide(mel, mask) if self.time_masks or self.freq_masks else mel

    def _hide(self, mel: Tensor, mask: Tensor | None) -> Tensor:
        """SpecAugment: hidden values become the mean of their bin, which tells least."""
        hidden = torch.zeros_like(mel, dtype=torch.bool)
        for _ in range(self.time_masks):
            hidden |= _span(mel, 1, self.time_width).unsqueeze(2)
        for _ in range(self.freq_masks):
            hidden |= _span(mel, 2, self.freq_width).unsqueeze(1)
        return torch.where(hidden, masked_mean(mel, mask), mel)

    def _mix(
        self,
        mel: Tensor,
        other: Tensor,
        share: float,
        snr: tuple[float, float],
        mask: Tensor | None,
    ) -> Tensor:
        mixed = mix(mel, other, _between(mel, snr), mask)
        return torch.where(_chosen(mel, share), mixed, mel)


def mix(mel: Tensor, other: Tensor, snr: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mix two sounds: their powers add up.

    Args:
        mel: (B, T, F) natural logs of power.
        other: (B, T, F) the sound to add, of any loudness.
        snr: (B, 1, 1) ratio of the mean powers of mel and of the sound that is added [dB].
        mask: (B, T) bool, the frames over which the powers are measured; None for all.

    Returns:
        (B, T, F).
    """
    gain = _level(mel, mask) - _level(other, mask) - snr * _NEPERS_PER_DECIBEL
    return torch.logaddexp(mel, other + gain)


def reverberate(mel: Tensor, seconds: Tensor) -> Tensor:
    """Spread the power of every frame over the following frames, as a room does.

    The power falls exponentially with time, as late reverberation in Polack's model. The sum of
    the power stays the same.

    Args:
        mel: (B, T, F) natural logs of power.
        seconds: (B, 1, 1) reverberation time, in which the power falls by 60 dB [s].

    Returns:
        (B, T, F).
    """
    batch, frames, _ = mel.shape
    age = torch.arange(_TAIL_FRAMES, device=mel.device, dtype=mel.dtype) * _FRAME_SECONDS
    decay = torch.exp(-6.0 * math.log(10.0) * age / seconds.view(batch, 1))  # (B, K)
    top = mel.amax((1, 2), keepdim=True)
    power = (mel - top).exp().permute(2, 0, 1)  # (F, B, T), each utterance a channel
    kernel = (decay / decay.sum(1, keepdim=True)).flip(1).unsqueeze(1)  # (B, 1, K)
    late = F.conv1d(F.pad(power, (_TAIL_FRAMES - 1, 0)), kernel, groups=batch)[..., :frames]
    return late.clamp(min=torch.finfo(mel.dtype).tiny).log().permute(1, 2, 0) + top


def smooth_curve(mel: Tensor, points: int) -> Tensor:
    """For each segment of mel (B, T, F) a curve through normally distributed points: (B, 1, F)."""
    knots = torch.randn(len(mel), 1, points, device=mel.device, dtype=mel.dtype)
    return F.interpolate(knots, mel.shape[2], mode="linear", align_corners=True)


def _level(mel: Tensor, mask: Tensor | None) -> Tensor:
    """Log of the mean power over valid frames and bins: (B, T, F) -> (B, 1, 1)."""
    if mask is not None:
        mel = mel.masked_fill(~mask.unsqueeze(2), -torch.inf)
        count = mask.sum(1).clamp(min=1).view(-1, 1, 1) * mel.shape[2]
    else:
        count = torch.full((1, 1, 1), mel.shape[1] * mel.shape[2], device=mel.device)
    return torch.logsumexp(mel, (1, 2), keepdim=True) - count.log()


def _voices(mel: Tensor) -> Tensor:
    """The sum of one to three other segments of the batch, for each segment of mel (B, T, F)."""
    batch = len(mel)
    other = mel[_others(batch, mel.device)]
    count = torch.randint(1, 4, (batch, 1, 1), device=mel.device)
    for number in (2, 3):
        louder = torch.logaddexp(other, mel[_others(batch, mel.device)])
        other = torch.where(count >= number, louder, other)
    return other


def _others(batch: int, device: torch.device) -> Tensor:
    """For each of `batch` segments the index of another, or its own in a batch of 1: (B,) int64."""
    step = torch.randint(1, max(2, batch), (batch,), device=device)
    return (torch.arange(batch, device=device) + step) % batch


def _between(mel: Tensor, bounds: tuple[float, float]) -> Tensor:
    """A random number for each segment, uniform between the bounds: (B, 1, 1)."""
    low, high = bounds
    draw = torch.rand(len(mel), 1, 1, device=mel.device, dtype=mel.dtype)
    return low + (high - low) * draw


def _chosen(mel: Tensor, share: float) -> Tensor:
    """Choose a share of the segments at random: (B, 1, 1) bool."""
    return torch.rand(len(mel), 1, 1, device=mel.device) < share


def _span(mel: Tensor, axis: int, longest: int) -> Tensor:
    """For each segment a random span of 0 to `longest` places along an axis: (B, size) bool."""
    size = mel.shape[axis]
    width = torch.randint(0, longest + 1, (len(mel), 1), device=mel.device)
    room = (size - width + 1).clamp(min=1)
    start = (torch.rand(len(mel), 1, device=mel.device) * room).floor()
    place = torch.arange(size, device=mel.device)
    return (place >= start) & (place < start + width)
