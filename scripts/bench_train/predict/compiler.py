"""The fused kernels beside those that TorchInductor makes of the same step, on this CPU.

Both are counted without the optimiser, which is not compiled on a CPU. TorchInductor tells the
bytes of its kernels before it writes their code; nothing is timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch._inductor.config
from torch import Tensor
from torch._inductor.scheduler import Scheduler

from scripts.bench_train.predict.fuse import fuse, traffic_of
from scripts.bench_train.predict.steps import Step
from scripts.bench_train.predict.trace import traced

# Nodes of TorchInductor that make no kernel.
_NO_KERNEL = "NopKernelSchedulerNode"


def compare(name: str, batch: int) -> dict[str, Any]:
    """Kernels and bytes of a recipe's forward and backward pass in bfloat16, by both.

    Needs a C++ compiler, and takes a minute.
    """
    step = Step(name, batch, "bf16")
    objective = step.step.objective
    inputs = step.batch["mel"], None, step.batch["label"]

    def run(compute: Any) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss: Tensor = compute(*inputs)[0]
        loss.backward()
        step.step.optimizer.zero_grad()

    with traced(like_gpu=True, decomposed=True) as trace:
        run(objective.compute)
    groups = fuse(trace.operations)
    ours = {"kernels": len(groups), "bytes": sum(traffic_of(trace, groups))}
    with _listening() as theirs:
        run(torch.compile(objective.compute, fullgraph=True, dynamic=False))
    return {
        "recipe": name,
        "batch": batch,
        "counted": ours,
        "inductor": theirs,
        "kernels": ours["kernels"] / theirs["kernels"],
        "bytes": ours["bytes"] / theirs["bytes"],
    }


@contextmanager
def _listening() -> Iterator[dict[str, Any]]:
    """Sum up the kernels of all graphs that are compiled in the block."""
    found = {"kernels": 0, "bytes": 0}
    generate = Scheduler.codegen

    def codegen(self: Scheduler) -> Any:
        for node in self.nodes:
            if type(node).__name__ != _NO_KERNEL:
                found["kernels"] += 1
                found["bytes"] += int(node.get_read_write_buffers_sizes())
        return generate(self)

    torch._dynamo.reset()
    # From a cache, no code would be generated.
    fresh = torch._inductor.config.patch(force_disable_caches=True)
    with fresh, mock.patch.object(Scheduler, "codegen", codegen):
        yield found
    torch._dynamo.reset()
