"""The kernels of a step: operations one by one, or fused as a compiler fuses them.

The rules are those of TorchInductor in short. A kernel may hold elementwise operations over equally
many elements, and reductions along rows with what uses their results. A reduction of another kind
ends its kernel. Products, convolutions, attention, scattered additions and the kernels of the
optimiser stand alone. What is made and used within one kernel is neither written nor read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from scripts.bench_train.predict.trace import Operation, Trace

FUSED = {"pointwise", "row", "column", "random"}
# TorchInductor's `max_fusion_size`.
LARGEST = 64


@dataclass(frozen=True)
class Kernel:
    """One kernel: its arithmetic and its bytes, linear functions of the batch size.

    Attributes:
        kind: As of an `Operation`, or "memory" for kinds that only read and write.
        name: Names of its operations.
        flops: Arithmetic without segments, and of each segment.
        bytes: Bytes without segments, and of each segment.
        wide: Whether its numbers are float32.
    """

    kind: str
    name: str
    flops: tuple[float, float]
    bytes: tuple[float, float]
    wide: bool

    def at(self, batch: int) -> tuple[float, float]:
        """Arithmetic and bytes for a batch of this size."""
        return self.flops[0] + batch * self.flops[1], self.bytes[0] + batch * self.bytes[1]


@dataclass
class _Group:
    members: int = 0
    count: int = 0
    space: int = 0
    reduction: str | None = None
    reads: set[int] = field(default_factory=set)


def kernels_of(
    small: Trace, large: Trace, batches: tuple[int, int], *, fused: bool
) -> list[Kernel]:
    """The kernels of a step, from traces with two batch sizes.

    Raises:
        ValueError: The traces differ in more than the batch size.
    """
    first, second = small.operations, large.operations
    if [one.name for one in first] != [one.name for one in second]:
        raise ValueError("the step's operations depend on the batch size")
    groups = fuse(first) if fused else [[number] for number in range(len(first))]
    traffic = [traffic_of(trace, groups) for trace in (small, large)]
    kernels = []
    for number, group in enumerate(groups):
        flops = [sum(trace[index].flops for index in group) for trace in (first, second)]
        one = first[group[0]]
        kernels.append(
            Kernel(
                "memory" if one.kind in (*FUSED, "scatter", "list") else one.kind,
                "+".join(first[index].name for index in group),
                _line(batches, (flops[0], flops[1])),
                _line(batches, (traffic[0][number], traffic[1][number])),
                one.wide,
            )
        )
    return kernels


def _line(batches: tuple[int, int], values: tuple[float, float]) -> tuple[float, float]:
    slope = (values[1] - values[0]) / (batches[1] - batches[0])
    return values[0] - slope * batches[0], slope


def fuse(operations: Sequence[Operation]) -> list[list[int]]:
    """Put operations into kernels: lists of their positions."""
    writer: dict[int, int] = {}
    readers: dict[int, list[int]] = {}
    ancestors: list[int] = []
    place: list[int] = []
    groups: list[_Group] = []
    for index, one in enumerate(operations):
        makers = {writer[storage] for storage in one.reads if storage in writer}
        before = 0
        for maker in makers:
            before |= ancestors[maker] | 1 << maker
        ancestors.append(before)
        near = {place[maker] for maker in makers}
        near.update(place[reader] for storage in one.reads for reader in readers.get(storage, ()))
        allowed = [
            number
            for number in sorted(near)
            if _fits(one, groups[number])
            and all(_allows(groups[number], maker, ancestors, operations) for maker in makers)
        ]
        if allowed:
            # The group with which it shares most bytes.
            shared = {
                number: sum(size for key, size in one.reads.items() if key in groups[number].reads)
                for number in allowed
            }
            chosen = max(allowed, key=lambda number: (shared[number], number))
        else:
            chosen = len(groups)
            groups.append(_Group(space=one.space))
        place.append(chosen)
        _join(groups[chosen], index, one)
        for storage in one.reads:
            readers.setdefault(storage, []).append(index)
        for storage in one.writes:
            writer[storage] = index
            readers.pop(storage, None)
    found: list[list[int]] = [[] for _ in groups]
    for index, number in enumerate(place):
        found[number].append(index)
    return found


def _fits(one: Operation, group: _Group) -> bool:
    if one.kind not in FUSED or group.count >= LARGEST or group.reduction == "alone":
        return False
    reduction = one.kind if one.kind in ("row", "column") else None
    if reduction and group.reduction not in (None, reduction):
        return False
    # What follows a reduction along rows may run over its few results.
    return one.space == group.space or (group.reduction == "row" and one.space < group.space)


def _allows(
    group: _Group, maker: int, ancestors: Sequence[int], operations: Sequence[Operation]
) -> bool:
    """Whether an operation may be in a group although it uses what `maker` makes."""
    if group.members >> maker & 1:
        return operations[maker].kind != "column"
    return not ancestors[maker] & group.members


def _join(group: _Group, index: int, one: Operation) -> None:
    group.members |= 1 << index
    group.count += 1
    group.reads.update(one.reads, one.writes)
    if one.kind not in FUSED:
        group.reduction = "alone"
    elif one.kind in ("row", "column"):
        group.reduction = one.kind


def traffic_of(trace: Trace, groups: Sequence[Sequence[int]]) -> list[float]:
    """The bytes that each group reads and writes, without what stays within it."""
    operations = trace.operations
    place = {index: number for number, group in enumerate(groups) for index in group}
    read: list[dict[int, int]] = [{} for _ in groups]
    written: list[dict[int, int]] = [{} for _ in groups]
    writer: dict[int, int] = {}
    # What each write makes, until something outside the group reads it: (group, storage) to bytes.
    pending: dict[int, tuple[int, int]] = {}
    for index, one in enumerate(operations):
        own = place[index]
        for storage, size in one.reads.items():
            if storage in writer and writer[storage] == own:
                continue
            read[own][storage] = max(read[own].get(storage, 0), size)
            if storage in pending:
                number, made = pending[storage]
                written[number][storage] = max(written[number].get(storage, 0), made)
        for storage, size in one.writes.items():
            writer[storage] = own
            pending[storage] = (own, size)
    for storage, (number, size) in pending.items():
        # Memory that was there before the step stays: weights, moments, sums.
        if storage not in trace.made:
            written[number][storage] = max(written[number].get(storage, 0), size)
    return [
        float(sum(inputs.values()) + sum(outputs.values()))
        for inputs, outputs in zip(read, written, strict=True)
    ]
