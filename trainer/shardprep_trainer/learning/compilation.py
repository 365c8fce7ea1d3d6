"""Whether and how the step is compiled: `train.compile`.

The whole of a function is compiled, for the shapes of a run, or nothing of it: a part that the
compiler cannot take is an error, not a break. Where it fails, in whichever way, the step is
computed as it is, with a note.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend

from shardprep_trainer.errors import ConfigError

Way = Literal["off", "default", "graphs"]

# A shorter run would end before the compiling has paid.
_FEWEST_STEPS = 2000
# Above this area of a micro-batch [frames] a kernel takes longer than its launch.
_LARGEST_FOR_GRAPHS = 2**16
# Modes of `torch.compile` that record CUDA graphs on a GPU.
_MODES_WITH_GRAPHS = ("reduce-overhead", "max-autotune")
# CUDA graphs are recorded at the second call, and replayed from the third on.
_CALLS = {"off": 0, "default": 1, "graphs": 3}


@dataclass(frozen=True)
class Compilation:
    """How functions of the step are compiled."""

    way: Way = "off"
    """off leaves them as they are; graphs records the objective in CUDA graphs, too."""
    backend: str = "inductor"
    """A backend of `torch.compile`."""
    mode: str | None = None
    """A mode of `torch.compile`, other than that of the way."""

    @property
    def calls(self) -> int:
        """Calls of the objective after which nothing of it is compiled or recorded any more."""
        return _CALLS[self.way]

    def begin(self) -> None:
        """Tell CUDA graphs that what they gave before is no longer used."""
        if self.way == "graphs":
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]

    def objective(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile a function that returns tensors and has gradients."""
        mode = "reduce-overhead" if self.way == "graphs" else None
        return self._whole(function, self.mode or mode)

    def function(
        self, function: Callable[..., Any], warn: Callable[[str], None]
    ) -> Callable[..., Any]:
        """Compile a function without gradients.

        Args:
            function: May change tensors.
            warn: Is told if the compiler fails at the first call.

        Returns:
            The same compiled; if the compiler fails, the function itself takes its place.
        """
        compiled: Callable[..., Any] | None = self._whole(function, None)
        called = False

        def call(*arguments: Any) -> Any:
            nonlocal compiled, called
            if compiled is None:
                return function(*arguments)
            try:
                found = compiled(*arguments)
            # A compiler fails before anything is changed, and with errors of any kind.
            except Exception as error:
                if called:
                    raise
                compiled = None
                warn(failure(error))
                return function(*arguments)
            called = True
            return found

        return call

    def _whole(self, function: Callable[..., Any], mode: str | None) -> Callable[..., Any]:
        found: Callable[..., Any] = torch.compile(
            function, fullgraph=True, dynamic=False, backend=self.backend, mode=mode
        )
        return found


def choose(asked: str, accelerator: Accelerator, *, frames: int, steps: int) -> Compilation:
    """Decide how a run is compiled.

    Args:
        asked: `train.compile`.
        accelerator: Knows the device, and what `accelerate launch` was told of a compiler.
        frames: Frames of a micro-batch of one process.
        steps: Length of the run.

    Raises:
        ConfigError: Two compilers are asked for, or CUDA graphs without a GPU.
    """
    plugin, on_gpu = accelerator.state.dynamo_plugin, accelerator.device.type == "cuda"
    if plugin.backend != DynamoBackend.NO:
        backend = plugin.backend.value.lower()
        if asked != "auto":
            raise ConfigError(
                f"train.compile: found {asked}, and accelerate launch --dynamo_backend {backend}; "
                "leave out one of them"
            )
        if backend != "inductor":
            return Compilation("default", backend)
        mode = None if plugin.mode == "default" else plugin.mode
        graphs = on_gpu and mode in _MODES_WITH_GRAPHS
        return Compilation("graphs" if graphs else "default", mode=mode)
    if asked == "graphs" and not on_gpu:
        raise ConfigError(
            f"train.compile: found graphs on a {accelerator.device.type}, allowed is auto, off or "
            "default; CUDA graphs need a GPU"
        )
    if asked == "auto":
        if not on_gpu or steps < _FEWEST_STEPS:
            return Compilation("off")
        return Compilation("graphs" if frames <= _LARGEST_FOR_GRAPHS else "default")
    ways: dict[str, Way] = {"off": "off", "default": "default", "graphs": "graphs"}
    return Compilation(ways[asked])


@contextmanager
def without_accelerate(accelerator: Accelerator) -> Iterator[None]:
    """Keep accelerate from compiling, which would be done a second time, around its wrapper."""
    plugin = accelerator.state.dynamo_plugin
    backend, plugin.backend = plugin.backend, DynamoBackend.NO
    try:
        yield
    finally:
        plugin.backend = backend


def failure(error: Exception) -> str:
    """What to say of an error of the compiler."""
    # The first line may only say which compiler it was: "backend='inductor' raised:".
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (
        f"the step is not compiled, since the compiler failed: {type(error).__name__}: "
        f"{' '.join(lines[:2])[:300]}; --train.compile off does without it"
    )
