"""Two-dimensional trunks: residual networks over frames and mel bins.

`ResNet` and `ResNetConformer` are encoders as `encoder.contract` wants them; recipes name them as
they would a class of one's own. A convolution sees a pattern of the spectrum at any time and any
frequency.

Images are (B, C, T, F) with their channels last in memory, twice as fast on CPUs as other layouts:
the same memory is frames (B, T, F * C). Weights stay contiguous, as the optimiser Muon needs them.

Axis legend: B batch, T frames, F mel bins, C channels. A mask is (B, T) bool, True on the frames
that are speech; None says that every frame is. Every image comes out with zeros where its mask is
False, since convolutions pad with zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardprep_trainer.model.blocks import ConformerBlock
from shardprep_trainer.model.layers import Linear, MaskedBatchNorm1d, masked_mean, zero_padding

SQUEEZES = ("none", "frequency")
IMAGES = ("mel", "centered", "normalized")
_KERNEL = 3
_SQUEEZED = 16
# Added to the variance of a mel bin over an utterance [log-mel squared]; that of speech is above 1.
_LEAST_VARIANCE = 1e-3


class ResNet(nn.Module):
    """Residual network of basic blocks (He et al. 2016, arXiv 1512.03385).

    For speakers it is known as the r-vector (Zeinali et al. 2019, arXiv 1910.12592).

    Args:
        n_mels: Mel bins.
        channels: Channels of each stage.
        blocks: Blocks of each stage.
        time_strides: Factor by which the first block of each stage thins out the frames.
        mel_strides: The same of the mel bins.
        stem_strides: Both factors, frames and mel bins, of the convolution before the stages.
        squeeze: "frequency" lets each block weigh its mel bins, see `FrequencySqueeze`; "none"
            does not.
        images: What the first convolution sees side by side: "mel", the mels as they are;
            "centered", less their mean over the utterance, which a fixed filter of the channel does
            not change; "normalized", also divided by their deviation, which noise makes smaller.

    Attributes:
        width: Channels times mel bins that are left.
        subsampling: Product of the factors of the frames.

    Raises:
        ValueError: A list has another length, or a value is not allowed.
    """

    def __init__(
        self,
        n_mels: int,
        *,
        channels: Sequence[int] = (32, 64, 128, 256),
        blocks: Sequence[int] = (2, 2, 2, 2),
        time_strides: Sequence[int] = (1, 2, 2, 1),
        mel_strides: Sequence[int] = (1, 1, 2, 2),
        stem_strides: Sequence[int] = (1, 2),
        squeeze: str = "frequency",
        images: Sequence[str] = IMAGES,
    ) -> None:
        super().__init__()
        stages = {
            "channels": channels,
            "blocks": blocks,
            "time_strides": time_strides,
            "mel_strides": mel_strides,
        }
        for name, each in {**stages, "stem_strides": stem_strides}.items():
            if not (isinstance(each, list | tuple) and each and all(map(_is_count, each))):
                allowed = "a list of whole numbers, 1 or more each"
                raise ValueError(f"{name}: found {each}, allowed is {allowed}")
        for name, each in stages.items():
            if len(each) != len(channels):
                raise ValueError(f"{name}: found {len(each)} stages, channels has {len(channels)}")
        if len(stem_strides) != 2:
            raise ValueError(f"stem_strides: found {stem_strides}, allowed are two factors")
        if not (isinstance(images, list | tuple) and images and all(x in IMAGES for x in images)):
            raise ValueError(f"images: found {images}, allowed is a list of {', '.join(IMAGES)}")
        if squeeze not in SQUEEZES:
            raise ValueError(f"squeeze: found {squeeze}, allowed: {', '.join(SQUEEZES)}")
        self.subsampling, bins, inputs = stem_strides[0], -(-n_mels // stem_strides[1]), channels[0]
        self.images = tuple(images)
        self.stem = _convolution(len(images), inputs, (stem_strides[0], stem_strides[1]))
        self.norm = MaskedBatchNorm1d(inputs)
        self.blocks = nn.ModuleList()
        for outputs, number, time_stride, mel_stride in zip(*stages.values(), strict=True):
            for block in range(number):
                stride = (1, 1) if block else (time_stride, mel_stride)
                bins = -(-bins // stride[1])
                squeezed = FrequencySqueeze(bins) if squeeze == "frequency" else None
                self.blocks.append(BasicBlock(inputs, outputs, stride, squeezed))
                self.subsampling *= stride[0]
                inputs = outputs
        self.width = bins * inputs

    def forward(self, mel: Tensor, mask: Tensor | None) -> Tensor:
        """Encode frames.

        Args:
            mel: (B, T, F), zero where it is padded.
            mask: (B, T) bool, True on valid frames; None for all.

        Returns:
            (B, ceil(T / subsampling), width), zero where it is padded.
        """
        shown = {"mel": mel}
        if self.images != ("mel",):
            shown["centered"] = zero_padding(mel - masked_mean(mel, mask), mask)
        if "normalized" in self.images:
            variance = masked_mean(shown["centered"].square(), mask)
            shown["normalized"] = shown["centered"] * (variance + _LEAST_VARIANCE).rsqrt()
        # The channels must be the last in memory, by their strides too, also if there is but one.
        image = torch.stack([shown[name] for name in self.images], dim=3)
        image = image.permute(0, 3, 1, 2)  # (B, T, F, C) -> (B, C, T, F)
        image, mask = self.stem(image), _thin(mask, self.stem)
        image = _zero(F.relu(_normalise(image, self.norm, mask)), mask)
        for block in self.blocks:
            image, mask = block(image, mask)
        return image.permute(0, 2, 3, 1).flatten(2)  # (B, C, T, F) -> (B, T, F * C)


class ResNetConformer(nn.Module):
    """A `ResNet` with Conformer blocks behind it, at its frame rate.

    What the trunk and each block put out goes on side by side, as in MFA-Conformer (arXiv
    2203.15249).

    Args:
        n_mels: Mel bins.
        dim: Width D of the blocks.
        layers: Conformer blocks L.
        heads: Attention heads of a block; they divide dim.
        kernel_size: Length of the depthwise convolution [frames of the trunk], odd.
        dropout: Probability of every dropout in the blocks.
        channels: See `ResNet`; here three stages by default.
        blocks: See `ResNet`.
        time_strides: See `ResNet`.
        mel_strides: See `ResNet`.
        stem_strides: See `ResNet`.
        squeeze: See `ResNet`.
        images: See `ResNet`.

    Attributes:
        width: That of the trunk and L * D.
        subsampling: That of the trunk.

    Raises:
        ValueError: Sizes that do not fit.
    """

    def __init__(
        self,
        n_mels: int,
        *,
        dim: int = 192,
        layers: int = 3,
        heads: int = 4,
        kernel_size: int = 15,
        dropout: float = 0.1,
        channels: Sequence[int] = (32, 64, 128),
        blocks: Sequence[int] = (2, 2, 2),
        time_strides: Sequence[int] = (1, 2, 2),
        mel_strides: Sequence[int] = (1, 1, 2),
        stem_strides: Sequence[int] = (1, 2),
        squeeze: str = "frequency",
        images: Sequence[str] = IMAGES,
    ) -> None:
        super().__init__()
        for name, size in {"dim": dim, "layers": layers, "heads": heads}.items():
            if not _is_count(size):
                raise ValueError(f"{name}: found {size}, allowed is a whole number, 1 or more")
        if dim % heads:
            raise ValueError(f"dim: found {dim} with heads {heads}, allowed is a multiple of heads")
        if not _is_count(kernel_size) or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: found {kernel_size}; allowed: an odd number of frames")
        if isinstance(dropout, bool | str | list | None) or not 0 <= dropout < 1:
            raise ValueError(f"dropout: found {dropout}, allowed is 0 up to but not including 1")
        self.trunk = ResNet(
            n_mels,
            channels=channels,
            blocks=blocks,
            time_strides=time_strides,
            mel_strides=mel_strides,
            stem_strides=stem_strides,
            squeeze=squeeze,
            images=images,
        )
        self.subsampling = self.trunk.subsampling
        self.norm = nn.LayerNorm(self.trunk.width)
        self.linear = Linear(self.trunk.width, dim)
        self.blocks = nn.ModuleList(
            ConformerBlock(
                dim=dim,
                dim_head=dim // heads,
                heads=heads,
                conv_kernel_size=kernel_size,
                attn_dropout=dropout,
                ff_dropout=dropout,
                conv_dropout=dropout,
            )
            for _ in range(layers)
        )
        self.width = self.trunk.width + layers * dim
        self.joined_norm = nn.LayerNorm(self.width)

    def forward(self, mel: Tensor, mask: Tensor | None) -> Tensor:
        """Encode frames.

        Args:
            mel: (B, T, F), zero where it is padded.
            mask: (B, T) bool, True on valid frames; None for all.

        Returns:
            (B, ceil(T / subsampling), width).
        """
        # Under autocast only products are in 16 bits; the sum over the blocks stays in float32.
        wide = torch.promote_types(mel.dtype, torch.float32)
        outputs = [self.trunk(mel, mask).to(wide)]
        mask = None if mask is None else mask[:, :: self.subsampling]
        x = self.linear(self.norm(outputs[0])).to(wide)
        for block in self.blocks:
            x = block(x, mask)
            outputs.append(x)
        out: Tensor = self.joined_norm(torch.cat(outputs, dim=2))
        return out


class BasicBlock(nn.Module):
    """Two convolutions and what goes past them.

    Args:
        inputs: Channels of the input.
        outputs: Channels of the output.
        stride: Factors by which frames and mel bins are thinned out.
        squeeze: What weighs the mel bins, if anything.
    """

    def __init__(
        self, inputs: int, outputs: int, stride: tuple[int, int], squeeze: nn.Module | None
    ) -> None:
        super().__init__()
        self.first = _convolution(inputs, outputs, stride)
        self.first_norm = MaskedBatchNorm1d(outputs)
        self.second = _convolution(outputs, outputs, (1, 1))
        self.second_norm = MaskedBatchNorm1d(outputs)
        self.squeeze = squeeze
        self.stride = stride
        self.past: nn.Linear | None = None
        self.past_norm: MaskedBatchNorm1d | None = None
        if stride != (1, 1) or inputs != outputs:
            self.past = Linear(inputs, outputs, bias=False)
            self.past_norm = MaskedBatchNorm1d(outputs)

    def forward(self, image: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Map an image (B, C, T, F), zero where it is padded, and its mask to those put out."""
        inner, mask = self.first(image), _thin(mask, self.first)
        inner = _zero(F.relu(_normalise(inner, self.first_norm, mask)), mask)
        inner = _normalise(self.second(inner), self.second_norm, mask)
        if self.squeeze is not None:
            inner = self.squeeze(inner, mask)
        if self.past is not None and self.past_norm is not None:
            image = _normalise(self._past(image, self.past), self.past_norm, mask)
        return _zero(F.relu(inner + image), mask), mask

    def _past(self, image: Tensor, layer: nn.Linear) -> Tensor:
        """A convolution of one frame by one bin: (B, C, T, F) to the shape of the output.

        As a matrix: oneDNN's gradient of such a convolution with a stride writes beyond the memory
        of its result, unless the channels are multiples of 32 (PyTorch 2.13, channels last).
        """
        rows = image[:, :, :: self.stride[0], :: self.stride[1]].permute(0, 2, 3, 1)
        out: Tensor = layer(rows.flatten(1, 2))  # (B, T, F, C) -> (B, T * F, C)
        return out.view(*rows.shape[:3], layer.out_features).permute(0, 3, 1, 2)


class FrequencySqueeze(nn.Module):
    """Weighs mel bins by their means over the utterance (Thienpondt et al. 2021, arXiv 2104.02370).

    The convolutions treat all frequencies alike; this tells them apart.

    Args:
        bins: Mel bins F.
    """

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.down = nn.Linear(bins, _SQUEEZED)
        self.up = nn.Linear(_SQUEEZED, bins)

    def forward(self, image: Tensor, mask: Tensor | None) -> Tensor:
        """Weigh an image (B, C, T, F); its padded frames may hold any finite number."""
        wide = torch.promote_types(image.dtype, torch.float32)
        means = masked_mean(image.mean(1, dtype=wide), mask)  # (B, C, T, F) -> (B, 1, F)
        weights = torch.sigmoid(self.up(F.relu(self.down(means))))
        out: Tensor = image * weights.unsqueeze(1).to(image.dtype)
        return out


def _is_count(value: object) -> bool:
    """Whether an option, which YAML may give as anything, is a whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _convolution(inputs: int, outputs: int, stride: tuple[int, int]) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, _KERNEL, stride, padding=_KERNEL // 2, bias=False)


def _thin(mask: Tensor | None, convolution: nn.Conv2d) -> Tensor | None:
    """The mask of what a convolution puts out."""
    return None if mask is None else mask[:, :: convolution.stride[0]]


def _normalise(image: Tensor, norm: nn.Module, mask: Tensor | None) -> Tensor:
    """BatchNorm over the valid frames of an image (B, C, T, F)."""
    if mask is not None:
        mask = mask.unsqueeze(2).expand(-1, -1, image.shape[3]).flatten(1)  # (B, T) -> (B, T * F)
    out: Tensor = norm(image.flatten(2), mask)  # (B, C, T, F) -> (B, C, T * F)
    return out.reshape(image.shape)


def _zero(image: Tensor, mask: Tensor | None) -> Tensor:
    """An image (B, C, T, F) with zeros for its padded frames."""
    if mask is None:
        return image
    rows = image.permute(0, 2, 3, 1)  # (B, C, T, F) -> (B, T, F, C)
    return zero_padding(rows.flatten(2), mask).view(rows.shape).permute(0, 3, 1, 2)
