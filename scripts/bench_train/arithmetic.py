"""How many operations a training step takes, and how many a second the device can do at most.

Axis legend: B batch, T frames, F mel bins, D width, S speakers.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from scripts.bench_train.gpus import find
from shardprep_trainer.model.cpu_kernels import is_slow_in_bfloat16

COUNTED = (
    "matrix products and convolutions of the forward pass of the `conformer` package's block with "
    "its pooling and classifier (a multiplication and an addition are 2), times 3 for the backward "
    "pass; no elementwise operation, normalisation, softmax or optimiser"
)
# The backward pass of a product is two products: the gradients of its input and of its weights.
FORWARD_AND_BACKWARD = 3
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def worthwhile_precisions(*, on_gpu: bool) -> tuple[str, ...]:
    """The precisions to measure by default: without bf16 where it takes many times as long."""
    narrow = on_gpu or not is_slow_in_bfloat16()
    return ("no", "bf16") if narrow else ("no",)


def train_flops(model: nn.Module, batch: Tensor) -> float:
    """Floating-point operations of a forward and a backward pass, per sample.

    Args:
        model: Takes the batch only. Its operations are not fused, so that the counter sees them.
        batch: (B, ...).
    """
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(batch)
    total: int = counter.get_total_flops()
    return FORWARD_AND_BACKWARD * total / len(batch)


def utilisation(samples_per_s: float, flops: float, peak: float) -> float:
    """The counted operations a second as a share of the device's peak.

    Args:
        samples_per_s: Samples a second.
        flops: Operations for each sample.
        peak: Operations a second.
    """
    return samples_per_s * flops / peak


def matmul_peak(device: torch.device, precision: str, *, size: int, trials: int = 5) -> float:
    """Operations a second of one large square matrix product, the median of some trials."""
    left, right = (torch.randn(size, size, device=device).to(DTYPES[precision]) for _ in range(2))
    # A GPU does many products a trial, so that the time to launch them does not matter.
    repeats = 20 if device.type == "cuda" else 1
    rates = []
    for _ in range(trials + 1):
        wait_for(device)
        began = time.perf_counter()
        for _ in range(repeats):
            left @ right
        wait_for(device)
        rates.append(2 * size**3 * repeats / (time.perf_counter() - began))
    return statistics.median(rates[1:])


def nominal_peak(name: str, precision: str) -> float | None:
    """Operations a second that the vendor states for a GPU; None if the GPU is not listed."""
    gpu = find(name)
    return gpu and (gpu.float32 if precision == "no" else gpu.half) * 1e12


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done all its work; on a CPU there is nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe_peak(device: torch.device, precision: str, size: int) -> dict[str, Any]:
    """The measured and the nominal peak of a device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "measured": matmul_peak(device, precision, size=size),
        "nominal": nominal_peak(name, precision),
    }
