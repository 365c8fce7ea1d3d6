"""What is measured while training, without waiting for the device between two log steps."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor


class Meter:
    """Sums over the samples of a logging window, kept on the device.

    The sums are one float64 vector, so that a log step costs one exchange between the ranks and
    one copy to the host. Its places: sum of losses, correct, samples, sum of the finite
    gradient norms, their number, first step that was not finite (0 for none).
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(6, dtype=torch.float64, device=device)

    def add_batch(self, loss: Tensor, correct: Tensor, samples: int) -> None:
        """Add a micro-batch: its mean loss (), its correct answers () and its size."""
        self.sums[0] += loss * samples
        self.sums[1] += correct
        self.sums[2] += samples

    def add_step(self, norm: Tensor, finite: Tensor, step: int) -> None:
        """Add an optimiser step: the norm of its gradient (), and whether all was finite ()."""
        usable = norm.isfinite()
        self.sums[3] += torch.where(usable, norm, 0.0)
        self.sums[4] += usable
        first = ~finite & (self.sums[5] == 0)
        self.sums[5] = torch.where(first, float(step), self.sums[5])

    def reset(self) -> None:
        """Begin a new window."""
        self.sums.zero_()


def combine(rows: Tensor) -> list[float]:
    """Join the sums of all ranks.

    Args:
        rows: (W, 6) sums of W ranks, as `Meter` keeps them.

    Returns:
        The places of `Meter.sums` for the whole; the gradient norms are those of rank 0, which
        all ranks share, and the first step that was not finite is the earliest of any rank.
    """
    table = rows.cpu()
    bad = table[:, 5][table[:, 5] > 0]
    first = float(bad.min()) if len(bad) else 0.0
    return [*table[:, :3].sum(0).tolist(), *table[0, 3:5].tolist(), first]


class Throughput:
    """Rates of the training steps since the last `restart`; time spent elsewhere is left out."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin a new window now."""
        self._start = time.perf_counter()
        self._waited = 0.0
        self._samples = 0

    def fetch(self, batches: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Take the next batch, and count its samples and how long it let us wait."""
        start = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - start
        self._samples += len(batch["label"])
        return batch

    def rates(self, world_size: int) -> dict[str, float]:
        """Samples a second of all ranks, and the share of time this rank waited for data."""
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        return {
            "samples_per_second": self._samples * world_size / elapsed,
            "waiting": self._waited / elapsed,
        }


def peak_memory_mib(device: torch.device) -> float:
    """Most memory this process held so far: on a CUDA device, else resident [MiB]."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
