"""How long kernels take: their arithmetic and bytes, divided by the rates of a machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from scripts.bench_train.gpus import GPU
from scripts.bench_train.predict.fuse import Kernel
from scripts.bench_train.predict.trace import Operation

# Kinds that are limited by their arithmetic; the others by their bytes.
ARITHMETIC = ("product", "convolution", "depthwise", "attention")
# Operations with fewer bytes take the time of a call, not that of their work.
SMALL = 100_000


@dataclass(frozen=True)
class Rates:
    """The rates of a machine.

    Attributes:
        work: Operations or bytes a second, by the kind of the kernel.
        wide: Operations a second of products of float32 beside others in 16 bits.
        least: The shortest time of a kernel [s].
    """

    work: dict[str, float]
    wide: float
    least: float

    def seconds(self, kernel: Kernel, batch: int) -> float:
        """The time that a kernel takes for a batch of this size."""
        flops, size = kernel.at(batch)
        moving = size / self.work["memory"]
        if kernel.kind not in ARITHMETIC:
            return max(size / self.work.get(kernel.kind, self.work["memory"]), self.least)
        exact = kernel.wide and kernel.kind == "product"
        rate = self.wide if exact else self.work[kernel.kind]
        return max(flops / rate, moving, self.least)


def measured_rates(operations: Iterable[Operation]) -> Rates:
    """The rates of the machine on which these operations were timed."""
    work: dict[str, list[float]] = {}
    small = [0.0, 0.0]
    for one in operations:
        if one.bytes < SMALL:
            small = [small[0] + 1, small[1] + one.seconds]
            continue
        kind = one.kind if one.kind in (*ARITHMETIC, "random", "list") else "memory"
        found = work.setdefault(kind, [0.0, 0.0])
        found[0] += one.flops if kind in ARITHMETIC else one.bytes
        found[1] += one.seconds
    rates = {kind: amount / seconds for kind, (amount, seconds) in work.items()}
    for kind in ARITHMETIC:
        rates.setdefault(kind, max(rates.get(other, 0.0) for other in ARITHMETIC))
    return Rates(rates, rates["product"], small[1] / max(1, small[0]))


@dataclass(frozen=True)
class Shares:
    """What a GPU's kernels reach of its data sheet, and what it takes to start them.

    The defaults are assumptions. `scripts.bench_train.gpu` measures on a GPU, and tells by what to
    scale them.

    Attributes:
        product: Of the tensor cores' rate, by matrix products.
        convolution: Of the same, by convolutions over all channels.
        attention: Of the same, by attention with a bias, forward and backward.
        depthwise: Of the rate outside of tensor cores, by convolutions of single channels.
        memory: Of the bandwidth, by kernels that only read and write.
        least: Shortest time of a kernel on the GPU [s].
        eager: Time of the host to start an operation, with its autograd [s].
        compiled: Time of the host to start a kernel from compiled code [s].
        call: Time of the host for a compiled step, beside its kernels [s].
        replay: Time of the host to replay a CUDA graph [s].
    """

    product: float = 0.65
    convolution: float = 0.4
    attention: float = 0.2
    depthwise: float = 0.1
    memory: float = 0.8
    least: float = 2e-6
    eager: float = 9e-6
    compiled: float = 6e-6
    call: float = 3e-4
    replay: float = 1e-4

    def scaled(self, device: float, host: float) -> Shares:
        """The shares of a GPU and of a host that take so many times as long."""
        slower = ("product", "convolution", "attention", "depthwise", "memory")
        changed = {name: getattr(self, name) / device for name in slower}
        changed |= {name: getattr(self, name) * host for name in ("eager", "compiled", "call")}
        return replace(self, **changed)


ASSUMED = Shares()


def gpu_rates(gpu: GPU, shares: Shares = ASSUMED) -> Rates:
    """The rates of a GPU, from its data sheet, at the clock that it keeps."""
    half, wide = (1e12 * gpu.sustained * rate for rate in (gpu.half, gpu.float32))
    work = {
        "product": shares.product * half,
        "convolution": shares.convolution * half,
        "attention": shares.attention * half,
        "depthwise": shares.depthwise * wide,
        "memory": shares.memory * gpu.bandwidth * 1e9,
    }
    return Rates(work, shares.product * wide, shares.least)


def step_seconds(
    kernels: Sequence[Kernel], gpu: GPU, way: str, batch: int, shares: Shares = ASSUMED
) -> tuple[float, float]:
    """The time of a step: of the GPU, and of the host, which starts the kernels.

    Both work side by side, so the longer time counts. From a CUDA graph the GPU starts kernels by
    itself.

    Args:
        kernels: Those of the step, compiled or not.
        gpu: The GPU.
        way: "eager", "compiled" or "graphs".
        batch: Segments of a batch.
        shares: What its kernels reach.
    """
    rates = gpu_rates(gpu, shares)
    host = {
        "eager": shares.eager * len(kernels),
        "compiled": shares.call + shares.compiled * len(kernels),
        "graphs": shares.replay,
    }
    return sum(rates.seconds(one, batch) for one in kernels), host[way]
