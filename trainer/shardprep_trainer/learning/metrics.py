"""What is measured while training: sums on the device, rates on the host.

Nothing here waits for the device between two log steps.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Sums(NamedTuple):
    """The elements of `Meter.sums`, of one rank or of all."""

    loss: float
    """Sum of the finite losses, each times its segments."""
    correct: float
    """Correct answers among these segments."""
    samples: float
    """Number of these segments."""
    norm: float
    """Sum of the gradient norms of the steps taken."""
    steps: float
    """Steps taken: those whose gradient was finite."""
    skipped: float
    """Steps skipped."""
    in_a_row: float
    """Steps skipped in a row, up to the last step; `Meter.reset` keeps this number."""
    diverged: float
    """First step at which these were too many, 0 for none; `Meter.reset` keeps this number."""


def batch_sums(loss: Tensor, correct: Tensor, samples: int) -> Tensor:
    """What a micro-batch adds to the first elements of `Sums`: loss, correct answers, segments.

    A micro-batch whose loss is not finite adds nothing: the mean would not be finite either.

    Args:
        loss: Mean loss ().
        correct: Number of correct answers ().
        samples: Number of segments.

    Returns:
        (3,) float64.
    """
    wide = loss.double()
    sums = torch.stack([wide * samples, correct.double(), torch.full_like(wide, samples)])
    return torch.where(loss.isfinite(), sums, 0.0)


class Meter:
    """Sums over the steps since the last log step, kept on the device.

    The sums are one float64 vector with the elements of `Sums`, so that a log step costs one
    exchange between the ranks and one copy to the host.

    Args:
        device: Where the losses are computed.
        max_skipped: Steps in a row that may be skipped.
    """

    def __init__(self, device: torch.device, max_skipped: int) -> None:
        self.sums = torch.zeros(len(Sums._fields), dtype=torch.float64, device=device)
        self.max_skipped = max_skipped

    def add_batch(self, sums: Tensor) -> None:
        """Add a micro-batch, of which `batch_sums` has made three sums (3,)."""
        self.sums[:3] += sums

    def add_step(self, norm: Tensor, step: Tensor) -> None:
        """Add an optimiser step: the norm of its gradient (), not finite if it was skipped.

        Args:
            norm: Of the gradient ().
            step: Number of the step, from 1 on (), float64.
        """
        taken = norm.isfinite()
        self.sums[3] += torch.where(taken, norm, 0.0)
        self.sums[4] += taken
        self.sums[5] += ~taken
        self.sums[6] = torch.where(taken, 0.0, self.sums[6] + 1)
        first = (self.sums[6] > self.max_skipped) & (self.sums[7] == 0)
        self.sums[7] = torch.where(first, step, self.sums[7])

    def reset(self) -> None:
        """Begin new sums."""
        self.sums[:6] = 0

    def restore(self, sums: Sequence[float]) -> None:
        """Continue the sums of a checkpoint, as `combine` gave them."""
        self.sums.copy_(torch.tensor(sums, dtype=torch.float64))


def combine(rows: Tensor) -> Sums:
    """Join the sums of all ranks.

    Args:
        rows: (W, 8) sums of W ranks, as `Meter` keeps them.

    Returns:
        The sums over all ranks. Norms and numbers of steps are those of rank 0: all ranks have
        the same gradient, so that they have the same norm and skip the same steps.
    """
    table = rows.cpu()
    return Sums(*table[:, :3].sum(0).tolist(), *table[0, 3:].tolist())


class Throughput:
    """Rates of the training steps since the last `restart`; time spent elsewhere is left out.

    Attributes:
        network_seconds: Returns how long readers have waited so far for data from a store [s].
    """

    def __init__(self) -> None:
        self.network_seconds: Callable[[], float] = float
        self.restart()

    def restart(self) -> None:
        """Begin to measure anew."""
        self._start = time.perf_counter()
        self._network = self.network_seconds()
        self._waited = 0.0
        self._samples = 0

    def fetch(self, batches: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Take the next batch; count its segments and the time of waiting for it."""
        start = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - start
        self._samples += len(batch["label"])
        return batch

    def rates(self, world_size: int) -> dict[str, float]:
        """The rates since the last `restart`.

        Returns:
            samples_per_second of all ranks; waiting, the share of time for which this rank waited
            for data; and network, the largest part of it that the network can have caused. A
            reader that waits for the network may delay nobody, as batches are prepared ahead.
        """
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        reader_waited = self.network_seconds() - self._network
        return {
            "samples_per_second": self._samples * world_size / elapsed,
            "waiting": self._waited / elapsed,
            "network": min(self._waited, reader_waited) / elapsed,
        }


def peak_memory_mib(device: torch.device) -> float:
    """Largest memory of this process so far: on a CUDA device, else resident [MiB]."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
