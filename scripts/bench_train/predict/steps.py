"""Training steps of the recipes, run on the CPU to be counted and timed.

Axis legend: B batch, T frames, F mel bins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from scripts.bench_train.predict.fuse import Kernel, kernels_of
from scripts.bench_train.predict.trace import Trace, fast_in_bfloat16, traced
from shardprep_trainer.config.command_line import RECIPES, parse_args
from shardprep_trainer.config.fields import Config
from shardprep_trainer.learning.build import build_train_step
from shardprep_trainer.model.build import build_model

NAMES = ("simple", "medium", "strong", "boss", "mfa", "trunk", "best")
# The homework's data.
N_MELS, SPEAKERS, FRAMES = 40, 600, 128
# Segments of the two traces that tell how all depends on the batch size. With odd numbers, segments
# have other sizes than weights, so that they are not taken for each other when kernels are fused.
FEW = (5, 7)


def recipe(name: str) -> Config:
    """The configuration of a recipe, to run its step operation by operation."""
    config = parse_args(["--config", str(RECIPES / f"{name}.yaml"), "--data.shards", "none"]).config
    if any(one.name == "compile" for one in fields(config.train)):
        config = replace(config, train=replace(config.train, compile="off"))  # type: ignore[call-arg]
    return config


class Step:
    """A recipe's training step on the CPU, on random segments (B, T, F).

    Args:
        name: The recipe.
        batch: Segments B.
        precision: "no" or "bf16".
    """

    def __init__(self, name: str, batch: int, precision: str = "no") -> None:
        config = recipe(name)
        AcceleratorState._reset_state(True)
        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        torch.manual_seed(0)
        self.step = build_train_step(
            config, build_model(config.model, N_MELS, SPEAKERS), accelerator
        )
        self.step.bare.train()
        self.batch = {
            "mel": torch.randn(batch, FRAMES, N_MELS),
            "length": torch.full((batch,), FRAMES),
            "label": torch.randint(0, SPEAKERS, (batch,)),
        }
        self.taken = 0
        # The first step makes the optimiser's moments.
        self()

    def __call__(self) -> None:
        """Take a step."""
        self.step(self._batches(), self.taken)
        self.taken += 1

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield self.batch

    def seconds(self, clock: Callable[[], float]) -> float:
        """The time that a step takes."""
        began = clock()
        self()
        return clock() - began

    def trace(
        self,
        *,
        like_gpu: bool,
        decomposed: bool = False,
        clock: Callable[[], float] | None = None,
    ) -> Trace:
        """Take a step and note its operations; see `trace.traced`."""
        kept: dict[int, int] = {}

        def keep(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return x

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
        with hooks, traced(like_gpu=like_gpu, decomposed=decomposed, clock=clock) as found:
            self()
        found.saved = sum(kept.values())
        return found


@dataclass(frozen=True)
class Count:
    """What a recipe's step in 16 bits takes on a GPU.

    Attributes:
        eager: Its kernels, operation by operation.
        fused: Its kernels, compiled.
        flops: Arithmetic of products, convolutions and attention for each segment.
        memory: Bytes of weights, and for each segment bytes kept for the backward pass.
        segments: Segments that the recipe trains on.
    """

    eager: list[Kernel]
    fused: list[Kernel]
    flops: float
    memory: tuple[float, float]
    segments: int


def count(name: str) -> Count:
    """Count the kernels of a recipe's step."""
    with fast_in_bfloat16():
        steps = [Step(name, batch, "bf16") for batch in FEW]
    whole, parts = (
        [step.trace(like_gpu=True, decomposed=decomposed) for step in steps]
        for decomposed in (False, True)
    )
    eager = kernels_of(whole[0], whole[1], FEW, fused=False)
    fused = kernels_of(parts[0], parts[1], FEW, fused=True)
    each = (whole[1].saved - whole[0].saved) / (FEW[1] - FEW[0])
    config = recipe(name)
    # Weights, gradients and two moments.
    weights = 16 * sum(x.numel() for x in steps[0].step.bare.parameters())
    return Count(
        eager,
        fused,
        sum(one.flops[1] for one in eager),
        (float(weights), each),
        config.train.total_steps * config.data.batch_size,
    )
