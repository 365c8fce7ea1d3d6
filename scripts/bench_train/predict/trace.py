"""Every operation of a training step: its arithmetic and the bytes that it reads and writes.

The step really runs, on the CPU and on a few segments, and each operation is noted as PyTorch calls
its kernel. For a GPU (`like_gpu`) the model computes as it does there: without the ways that only
CPUs have, and with one kernel for all of attention.

Axis legend: B batch, H heads, T frames, d width of a head.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import decomposition_table
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from shardprep_trainer.model import cpu_kernels

aten = torch.ops.aten
# A row that one group of threads can hold while it reduces it and goes on.
LONGEST_ROW = 16_384
# The backward pass computes the scores again, then four products.
ATTENTION_BACKWARD = 2.5

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addmv", "mv", "linear"}
_CONVOLUTIONS = {"convolution", "convolution_backward"}
_ROWS = {"native_layer_norm", "_softmax", "_log_softmax", "_softmax_backward_data"}
_ROWS |= {"_log_softmax_backward_data", "logsumexp"}
_SCATTERS = {"embedding_dense_backward", "index_put", "index_put_", "_index_put_impl_"}
_SCATTERS |= {"scatter_add", "scatter", "index_add", "index_add_", "nll_loss_backward"}
# They make no kernel run: a view, memory without contents, a number for the host.
_FREE = {"detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_FREE |= {"lift_fresh", "_local_scalar_dense", "resize_", "set_", "alias", "_unsafe_view"}
_DECOMPOSED = {"native_batch_norm", "native_batch_norm_backward", "native_layer_norm_backward"}


@dataclass(frozen=True)
class Operation:
    """One operation.

    Attributes:
        name: PyTorch's name.
        kind: "pointwise", "row" (a reduction along rows, whose result later operations of the same
            kernel may use), "column" (any other reduction), "product", "convolution", "depthwise",
            "attention", "scatter", "list" (one kernel over many tensors) or "random".
        flops: Arithmetic of products; 0 for others.
        space: Elements that it runs over.
        reads: Bytes read of each storage, by its number.
        writes: Bytes written to each storage.
        wide: Whether its numbers are float32.
        seconds: Time that it took here.
    """

    name: str
    kind: str
    flops: float
    space: int
    reads: dict[int, int]
    writes: dict[int, int]
    wide: bool = True
    seconds: float = 0.0

    @property
    def bytes(self) -> int:
        """Bytes that it reads and writes if it is a kernel of its own."""
        return sum(self.reads.values()) + sum(self.writes.values())


@dataclass
class Trace:
    """The operations of a step, in order."""

    operations: list[Operation] = field(default_factory=list)
    # Tensors stay in memory while their storages are told apart by address; None keeps none.
    kept: list[Tensor] | None = field(default_factory=list)
    numbers: dict[int, int] = field(default_factory=dict)
    # Memory that the forward pass keeps for the backward pass [bytes].
    saved: int = 0
    # Storages that an operation of the step made.
    made: set[int] = field(default_factory=set)

    def add(
        self,
        name: str,
        kind: str,
        inputs: list[Tensor],
        outputs: list[Tensor],
        flops: float = 0.0,
        seconds: float = 0.0,
        *,
        changed: Sequence[Tensor] = (),
    ) -> None:
        """Note an operation; it makes `outputs` and changes `changed` in place."""
        reads, writes = self._bytes(inputs), self._bytes(outputs)
        self.made.update(writes)
        writes |= self._bytes(changed)
        space = max((x.numel() for x in (*inputs, *outputs, *changed)), default=0)
        wide = any(x.dtype == torch.float32 for x in inputs)
        made = Operation(name, kind, flops, space, reads, writes, wide, seconds)
        self.operations.append(made)

    def _bytes(self, tensors: Sequence[Tensor]) -> dict[int, int]:
        found: dict[int, int] = {}
        seen: set[tuple[int, int]] = set()
        for x in tensors:
            if not x.numel() or (x.data_ptr(), x.numel()) in seen:
                continue
            seen.add((x.data_ptr(), x.numel()))
            storage = x.untyped_storage()
            number = self.numbers.setdefault(storage.data_ptr(), len(self.numbers))
            if self.kept is not None:
                self.kept.append(x.detach())
            size = found.get(number, 0) + x.numel() * x.element_size()
            # Less where elements are repeated by a stride of 0.
            found[number] = min(size, storage.nbytes())
        return found


@contextmanager
def traced(
    *, like_gpu: bool, decomposed: bool = False, clock: Callable[[], float] | None = None
) -> Iterator[Trace]:
    """Note all operations of the block.

    Args:
        like_gpu: As they are on a GPU; otherwise as they are on this CPU.
        decomposed: Split normalisations into the parts that a compiler fuses one by one.
        clock: Tells the time in seconds. With it the operations are timed. Memory is then freed as
            ever, so their storages cannot be told apart.
    """
    trace = Trace() if clock is None else Trace(kept=None)
    clock = clock or time.perf_counter
    recorder = _Recorder(trace, clock, decomposed=decomposed)
    with ExitStack() as stack:
        if like_gpu:
            stack.enter_context(mock.patch.object(cpu_kernels, "applies_to", return_value=False))
            stack.enter_context(fast_in_bfloat16())
            stack.enter_context(_attention_as_on_a_gpu())
            stack.enter_context(_OneKernelAttention(recorder))
        else:
            stack.enter_context(_noted_draws(trace, clock))
        stack.enter_context(recorder)
        try:
            yield trace
        finally:
            trace.kept = None


def fast_in_bfloat16() -> Any:
    """Let this CPU count as fast in bfloat16, as a GPU is; what is built in the block, too."""
    return mock.patch.object(cpu_kernels, "_NARROW", ())


class _Recorder(TorchDispatchMode):
    def __init__(self, trace: Trace, clock: Callable[[], float], *, decomposed: bool) -> None:
        super().__init__()
        self.clock = clock
        self.trace = trace
        self.decomposed = decomposed
        self.paused = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if self.decomposed and not self.paused and name in _DECOMPOSED:
            with self:
                return decomposition_table[func](*args, **kwargs)
        began = self.clock()
        out = func(*args, **kwargs)
        seconds = self.clock() - began
        if not (self.paused or func.is_view or name in _FREE):
            inputs, outputs = _tensors((args, kwargs)), _tensors(out)
            changed = _tensors(_mutated(func, args)) if func._schema.is_mutable else []
            # What is changed in place is returned too.
            outputs = [] if changed else outputs
            if name in ("copy_", "fill_", "zero_"):
                inputs = inputs[1:]
            if outputs or changed:
                kind = _kind(func, name, args, inputs, [*outputs, *changed])
                flops = _flops(func, name, args, kwargs, out)
                self.trace.add(name, kind, inputs, outputs, flops, seconds, changed=changed)
        return out


def _tensors(value: Any) -> list[Tensor]:
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


def _mutated(func: Any, args: tuple[Any, ...]) -> list[Any]:
    arguments = func._schema.arguments
    return [
        value
        for value, argument in zip(args, arguments, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def _kind(
    func: Any, name: str, args: tuple[Any, ...], inputs: list[Tensor], outputs: list[Tensor]
) -> str:
    if name in _PRODUCTS or name.startswith("exact_product"):
        return "product"
    if name in _CONVOLUTIONS:
        return "depthwise" if _groups(name, args) > 1 else "convolution"
    if name.startswith(("_foreach", "_fused")):
        return "list"
    if name in _SCATTERS:
        return "scatter"
    if name in _ROWS:
        return "row"
    if torch.Tag.nondeterministic_seeded in func.tags and name != "native_dropout":
        return "random"
    if torch.Tag.reduction in func.tags and inputs and outputs:
        return "row" if _is_along_rows(inputs[0], outputs[0]) else "column"
    return "pointwise"


def _is_along_rows(x: Tensor, out: Tensor) -> bool:
    """Whether a reduction of x to out sums short stretches of neighbours in memory."""
    if out.numel() <= 1 or x.numel() > LONGEST_ROW * out.numel():
        return False
    sizes = out.shape if out.ndim == x.ndim else None
    neighbours = [axis for axis, stride in enumerate(x.stride()) if stride == 1]
    if sizes is not None:
        return any(sizes[axis] == 1 and x.shape[axis] > 1 for axis in neighbours)
    # The axes that are left are those of the input in order, or the last ones are gone.
    return bool(neighbours) and tuple(out.shape) == tuple(x.shape[: out.ndim])


def _groups(name: str, args: tuple[Any, ...]) -> int:
    return int(args[8] if name == "convolution" else args[9])


def _flops(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> float:
    if name in _CONVOLUTIONS:
        # Every output element is a sum over the weights of its channel.
        produced, weight = (out, args[1]) if name == "convolution" else (args[0], args[2])
        once = 2.0 * produced.numel() * weight.numel() / len(weight)
        return once if name == "convolution" else once * sum(args[10][:2])
    if name.startswith("exact_product"):
        a, b = args[:2]
        return 2.0 * a.numel() * b.numel() / a.shape[-1]
    count = flop_registry.get(func._overloadpacket)
    return float(count(*args, **kwargs, out_val=out)) if count is not None else 0.0


class _OneKernelAttention(TorchFunctionMode):
    """Attention as a GPU's fused kernel: one kernel forward, one backward."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False), **kwargs)
        q, k, v, bias = (given.get(x) for x in ("query", "key", "value", "attn_mask"))
        scale = given.get("scale") or q.shape[-1] ** -0.5
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            q, k, v = (x.to(dtype) for x in (q, k, v))
            bias = bias if bias is None or bias.dtype == torch.bool else bias.to(dtype)
        return _Attention.apply(q, k, v, bias, scale, self.recorder)  # type: ignore[no-untyped-call]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        scale: float,
        recorder: _Recorder,
    ) -> Tensor:
        given = [x for x in (q, k, v, bias) if x is not None]
        with _paused(recorder):
            out = _attend(q, k, v, bias, scale)
        ctx.save_for_backward(q, k, v, bias, out)
        ctx.scale, ctx.recorder = scale, recorder
        ctx.flops = 4.0 * q.numel() * k.shape[2]
        recorder.trace.add("attention", "attention", given, [out], ctx.flops)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, out = ctx.saved_tensors
        with _paused(ctx.recorder), torch.enable_grad():
            learns = ctx.needs_input_grad[3]
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            leaf = bias.detach().requires_grad_() if learns else bias
            again = _attend(*leaves, leaf, ctx.scale)
            wanted = [*leaves, leaf] if learns else leaves
            found = torch.autograd.grad(again, wanted, grad)
        given = [x for x in (grad, out, q, k, v, bias) if x is not None]
        flops = ATTENTION_BACKWARD * ctx.flops
        ctx.recorder.trace.add("attention_backward", "attention", given, list(found), flops)
        by_bias = found[3] if learns else None
        return (*found[:3], by_bias, None, None)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Attend q, k, v (B, H, T, d) with a bias that is added: (B, H, T, d)."""
    scores = (q @ k.mT).float() * scale
    if bias is not None:
        floor = torch.finfo(torch.float32).min
        scores = scores.masked_fill(~bias, floor) if bias.dtype == torch.bool else scores + bias
    return scores.softmax(-1).to(v.dtype) @ v


@contextmanager
def _paused(recorder: _Recorder) -> Iterator[None]:
    recorder.paused = True
    try:
        yield
    finally:
        recorder.paused = False


def _attention_as_on_a_gpu() -> Any:
    from shardprep_trainer.model import blocks

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)

    return mock.patch.object(blocks, "attend", attend)


def _noted_draws(trace: Trace, clock: Callable[[], float]) -> Any:
    """Note the random numbers of `cpu_kernels.drop`, which NumPy draws."""
    drop: Callable[[Tensor, float], Tensor] = cpu_kernels.drop

    def noted(x: Tensor, p: float) -> Tensor:
        began, before = clock(), len(trace.operations)
        out = drop(x, p)
        passed = clock() - began
        inner = sum(one.seconds for one in trace.operations[before:])
        drawn = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64)
        trace.add("draw", "random", [], [drawn], seconds=max(0.0, passed - inner))
        return out

    return mock.patch.object(cpu_kernels, "drop", noted)
