"""What the data sheets of GPUs say."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """A GPU by its vendor's data sheet; rates are dense, without sparsity.

    Attributes:
        name: All words of it are in the name that the driver gives.
        float32: Arithmetic in float32, outside of tensor cores [1e12/s].
        half: Products in float16, or in bfloat16 where the GPU has it, by tensor cores [1e12/s].
        bandwidth: Of its memory [1e9 bytes/s].
        memory: Its size [1e9 bytes].
        bfloat16: Whether its tensor cores multiply bfloat16.
        sustained: Share of its highest clock, which the rates are for, that it keeps under load.
    """

    name: str
    float32: float
    half: float
    bandwidth: float
    memory: float
    bfloat16: bool = True
    sustained: float = 1.0


# The first match counts, so longer names come first.
GPUS = (
    GPU("H100 PCIe", 51.0, 756.0, 2000.0, 80.0),
    GPU("H100 NVL", 60.0, 835.0, 3900.0, 94.0),
    GPU("H200", 67.0, 989.0, 4800.0, 141.0),
    GPU("H100", 67.0, 989.0, 3350.0, 80.0),
    GPU("A100", 19.5, 312.0, 2039.0, 80.0),
    GPU("V100", 15.7, 125.0, 900.0, 16.0, bfloat16=False),
    # Its limit of 70 W takes the clock from 1,590 to some 900 MHz:
    # https://github.com/mlcommons/inference_results_v0.5/issues/20
    GPU("T4", 8.1, 65.0, 320.0, 16.0, bfloat16=False, sustained=0.57),
)


def find(name: str) -> GPU | None:
    """The GPU that the driver calls `name`; None if it is not listed."""
    return next((gpu for gpu in GPUS if all(word in name for word in gpu.name.split())), None)
