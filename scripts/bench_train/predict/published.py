"""Training speeds that others measured on GPUs, beside what the method predicts for them.

No GPU is needed: the networks are built as their authors describe them, and their steps are counted
as those of the recipes are. They are convolutional networks for images, so they test what the
two-dimensional trunk spends its time on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripts.bench_train.gpus import find
from scripts.bench_train.predict.fuse import Kernel, kernels_of
from scripts.bench_train.predict.rates import ASSUMED, step_seconds
from scripts.bench_train.predict.trace import Trace, fast_in_bfloat16, traced

# Images of the two traces.
FEW = (2, 3)


class WideBlock(nn.Module):
    """Two convolutions after BatchNorm each, with dropout between them (Zagoruyko 2016)."""

    def __init__(self, taken: int, made: int, stride: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(taken), nn.BatchNorm2d(made)])
        self.first = nn.Conv2d(taken, made, 3, 1, 1)
        self.second = nn.Conv2d(made, made, 3, stride, 1)
        same = stride == 1 and taken == made
        self.past = nn.Identity() if same else nn.Conv2d(taken, made, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to (B, C', H', W')."""
        y = F.dropout(self.first(self.norms[0](x).relu()), 0.3)
        return torch.add(self.second(self.norms[1](y).relu()), self.past(x))


class Bottleneck(nn.Module):
    """Three convolutions, the middle one narrow and with the stride (He 2016, version 1.5)."""

    def __init__(self, taken: int, made: int, stride: int) -> None:
        super().__init__()
        narrow = made // 4
        self.body = nn.Sequential(
            *_normed(taken, narrow, 1, 1),
            nn.ReLU(),
            *_normed(narrow, narrow, 3, stride),
            nn.ReLU(),
            *_normed(narrow, made, 1, 1),
        )
        self.past = nn.Sequential(*([] if taken == made else _normed(taken, made, 1, stride)))

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to (B, C', H', W')."""
        return torch.add(self.body(x), self.past(x)).relu()


def _normed(taken: int, made: int, size: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(taken, made, size, stride, size // 2, bias=False), nn.BatchNorm2d(made)]


def _stages(
    block: Callable[[int, int, int], nn.Module], taken: int, stages: list[tuple[int, int, int]]
) -> list[nn.Module]:
    """Blocks of several stages, each (width, blocks, stride)."""
    blocks = []
    for width, count, stride in stages:
        for number in range(count):
            blocks.append(block(taken, width, 1 if number else stride))
            taken = width
    return blocks


def wide_resnet() -> nn.Module:
    """Wide ResNet 28-10 for images of 32 x 32."""
    stages = [(160, 4, 1), (320, 4, 2), (640, 4, 2)]
    ends = [nn.BatchNorm2d(640), nn.ReLU(), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(640, 10)]
    return nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), *_stages(WideBlock, 16, stages), *ends)


def resnet50() -> nn.Module:
    """ResNet-50 for images of 224 x 224."""
    stages = [(256, 3, 1), (512, 4, 2), (1024, 6, 2), (2048, 3, 2)]
    stem = [*_normed(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    ends = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000)]
    return nn.Sequential(*stem, *_stages(Bottleneck, 64, stages), *ends)


@dataclass(frozen=True)
class Published:
    """A training speed that others measured, in 16 bits, operation by operation.

    Attributes:
        network: Its name.
        make: Builds the network.
        side: Height and width of an image [pixels].
        gpu: As `gpus.find` knows it.
        batch: Images of a step.
        images_per_s: Images a second, as published.
        source: Where.
    """

    network: str
    make: Callable[[], nn.Module]
    side: int
    gpu: str
    batch: int
    images_per_s: float
    source: str


# Ten epochs of CIFAR-10 (390 steps of 128 images) and their validations (10,000 images forward, a
# third of a step's work) in 29 min 31 s.
_WIDE = 10 * (390 * 128 + 10_000 / 3) / (29 * 60 + 31)
PUBLISHED = (
    Published(
        "Wide ResNet 28-10",
        wide_resnet,
        32,
        "T4",
        128,
        _WIDE,
        "https://blog.ceshine.net/post/apex-t4-p100/",
    ),
    Published(
        "ResNet-50",
        resnet50,
        224,
        "V100",
        128,
        128 / 0.11093,
        "https://github.com/sandeepkumar-skb/pytorch_experiments",
    ),
    Published(
        "ResNet-50",
        resnet50,
        224,
        "A100",
        512,
        2600.0,
        "https://github.com/huggingface/pytorch-image-models/issues/1491",
    ),
)


def kernels(make: Callable[[], nn.Module], side: int) -> list[Kernel]:
    """The kernels of a training step of a network, operation by operation."""
    with fast_in_bfloat16():
        small, large = (_trace(make(), side, batch) for batch in FEW)
    return kernels_of(small, large, FEW, fused=False)


def _trace(network: nn.Module, side: int, batch: int) -> Trace:
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, foreach=True)
    images = torch.randn(batch, 3, side, side).to(memory_format=torch.channels_last)
    labels = torch.zeros(batch, dtype=torch.int64)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(network(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    # The first step makes the optimiser's momenta.
    step()
    with traced(like_gpu=True) as found:
        step()
    return found


def compare() -> list[dict[str, Any]]:
    """What the method predicts for each published speed."""
    counted: dict[str, list[Kernel]] = {}
    rows = []
    for one in PUBLISHED:
        if one.network not in counted:
            counted[one.network] = kernels(one.make, one.side)
        gpu = find(one.gpu)
        assert gpu is not None
        device, host = step_seconds(counted[one.network], gpu, "eager", one.batch, ASSUMED)
        predicted = one.batch / max(device, host)
        rows.append(
            {
                "network": one.network,
                "gpu": gpu.name,
                "batch": one.batch,
                "predicted_images_per_s": predicted,
                "published_images_per_s": one.images_per_s,
                "ratio": predicted / one.images_per_s,
                "source": one.source,
            }
        )
    return rows
