"""Networks that others timed are built as they describe them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from scripts.bench_train.predict import published
from scripts.bench_train.predict.fuse import Kernel

RESULT = Path(__file__).parents[4] / "scripts" / "results" / "predict.json"


@pytest.mark.parametrize(
    ("make", "side", "weights", "classes"),
    # The weights that torchvision and the authors of Wide ResNet state; the latter without biases
    # of convolutions, which this implementation has: 16 + 4 stages of 8 and 3 shortcuts.
    [
        (published.resnet50, 32, 25_557_032, 1000),
        (published.wide_resnet, 32, 36_479_194, 10),
    ],
)
def test_networks_have_the_published_numbers_of_weights(
    make: published.Callable[[], torch.nn.Module], side: int, weights: int, classes: int
) -> None:
    network = make()
    biases = sum(
        one.bias.numel()
        for one in network.modules()
        if isinstance(one, torch.nn.Conv2d) and one.bias is not None
    )
    assert sum(x.numel() for x in network.parameters()) - biases == weights
    with torch.inference_mode():
        assert network.eval()(torch.randn(2, 3, side, side)).shape == (2, classes)


def test_a_row_compares_the_time_of_the_kernels_with_what_was_published(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # 256 MB an image at .8 of 320 GB/s: 1 ms.
    copy = Kernel("memory", "copy", (0.0, 0.0), (0.0, 256e6), wide=False)
    monkeypatch.setattr(published, "kernels", lambda make, side: [copy])
    one = published.Published("net", published.resnet50, 32, "T4", 8, 500.0, "https://x.org")
    monkeypatch.setattr(published, "PUBLISHED", (one,))
    (row,) = published.compare()
    assert row["predicted_images_per_s"] == pytest.approx(1000)
    assert row["ratio"] == pytest.approx(2)


def test_the_method_predicts_published_speeds_of_convolutions_within_a_quarter() -> None:
    rows = json.loads(RESULT.read_text())["published"]
    assert {row["gpu"] for row in rows} == {"T4", "V100", "A100"}
    assert all(0.75 <= row["ratio"] <= 1.25 for row in rows)
