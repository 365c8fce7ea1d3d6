"""Reads the `.pt` file of any dense tensor, in today's or the older format, without unpickling it.

`torch.save` writes a zip file of uncompressed records, each with its CRC-32:

    NAME/data.pkl    the pickle that says how to put the tensor together
    NAME/data/KEY    its numbers
    NAME/version     and further records that say how to read the two

No size in a file is trusted: each is compared with the bytes that are there before it is used.
"""

from __future__ import annotations

import io
import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardprep.source.pt.other import AGAIN, ends_early, what_else
from shardprep.source.pt.pickle import (
    Explained,
    Storage,
    TensorCall,
    refuse_other,
    run_pickle,
    usual_call,
)
from shardprep.source.pt.zip import ZIP_MAGIC, DamagedRecord, read_records

# NumPy has no bfloat16, the upper half of a float32.
_DTYPES = {"float16": "<f2", "float32": "<f4", "float64": "<f8", "bfloat16": "<u2"}

_AS_FLOATS = dict.fromkeys(("complex64", "complex128"), "tensor.abs() if that is what is meant")
# The record "byteorder" of a file, and what NumPy calls it.
_ORDERS = {b"little": "<", b"big": ">"}

# What precedes the tensor in the older format: a magic number, a version, facts of the machine.
_OLDER_MAGIC, _OLDER_VERSION = 0x1950A86A20F9469CFC6C, 1001


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file describes it; its numbers are a view of the file's bytes.

    Attributes:
        kind: Element type by PyTorch's name, such as "bfloat16".
        numbers: The numbers, of any shape; bfloat16 as uint16.
        repeats: Whether the tensor is a view that has more numbers than the file.
        negated: Whether the numbers are to be negated.
    """

    kind: str
    numbers: NDArray[Any]
    repeats: bool
    negated: bool

    def values(self) -> NDArray[Any]:
        """The tensor's values, in its shape: float16, float32 or float64."""
        values = self.numbers
        if self.kind == "bfloat16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        return -values if self.negated else values


def read_tensor(data: bytes) -> StoredTensor:
    """The tensor in the bytes of a `.pt` file.

    Raises:
        ValueError: The file does not hold exactly one dense tensor of floating-point numbers. The
            message completes a sentence that begins with the file's name.
    """
    try:
        return _from_zip(data) if data.startswith(ZIP_MAGIC) else _from_older(data)
    except (Explained, DamagedRecord):
        raise
    except ValueError as error:
        why = f"that can be loaded safely: {str(error)[:200]}"
        if not data.startswith((ZIP_MAGIC, b"\x80")):
            # Not even a pickle: what its first byte would mean in one says nothing.
            why = f"of torch.save: it begins with the bytes {data[:4].hex(' ')}; {AGAIN}"
        raise ValueError(what_else(data) or f"not a tensor file {why}") from None


def _from_zip(data: bytes) -> StoredTensor:
    records = read_records(data)
    order = bytes(records.get("byteorder", b"little")[:10])
    if order not in _ORDERS:
        raise ValueError("its numbers are in an order that is unknown")
    if "data.pkl" not in records:
        raise ValueError("it has no record data.pkl")
    program = bytes(records["data.pkl"])
    call = _tensor(usual_call(program) or _run(program))
    if f"data/{call.storage.key}" not in records:
        raise ValueError(f"it has no record data/{call.storage.key}")
    return _placed(call, records[f"data/{call.storage.key}"], _ORDERS[order])


def _run(program: bytes) -> Any:
    file = io.BytesIO(program)
    result = run_pickle(file)
    if file.read(1):
        raise ValueError("its pickle goes on after its end")
    return result


def _from_older(data: bytes) -> StoredTensor:
    file = io.BytesIO(data)
    try:
        magic = run_pickle(file)
    except ValueError as error:
        # Every pickle since Python 2.3 begins so.
        if isinstance(error, Explained) or file.read(1) or not data.startswith(b"\x80"):
            raise
        raise Explained(ends_early(data)) from None
    if magic != _OLDER_MAGIC:
        refuse_other(magic)
    try:
        if run_pickle(file) != _OLDER_VERSION:
            raise ValueError("it is of an unknown version of torch.save")
        run_pickle(file)
        call = _tensor(run_pickle(file))
        keys = run_pickle(file)
    except ValueError as error:
        if isinstance(error, Explained) or file.read(1):
            raise
        raise Explained(ends_early(data)) from None
    if keys != [call.storage.key]:
        raise ValueError("it has other numbers than those of one tensor")
    begin = file.tell() + 8
    if len(data) < begin:
        raise Explained(ends_early(data))
    if data[begin - 8 : begin] != struct.pack("<Q", call.storage.numel % 2**64):
        raise ValueError("it has another count of numbers than its pickle says")
    itemsize = np.dtype(_DTYPES[call.storage.kind]).itemsize
    if len(data) - begin < call.storage.numel * itemsize:
        raise Explained(ends_early(data))
    return _placed(call, memoryview(data)[begin:])


def _placed(call: TensorCall, numbers: memoryview | bytes, order: str = "<") -> StoredTensor:
    """The tensor as a view of its numbers. ValueError if it reaches beyond them."""
    kind, _, count = call.storage
    dtype = np.dtype(_DTYPES[kind]).newbyteorder(order)  # type: ignore[arg-type]
    if count * dtype.itemsize != len(numbers):
        raise ValueError(f"it has {len(numbers)} bytes of numbers, but claims {count} of {kind}")
    # Along an axis of length 1 the stride does not matter, and may be any number.
    steps = [step if n > 1 else 0 for n, step in zip(call.shape, call.strides, strict=True)]
    last = call.offset + sum((n - 1) * step for n, step in zip(call.shape, steps, strict=True))
    if 0 in call.shape:
        raise Explained(f"has shape {call.shape}, expected numbers")
    if last >= count:
        raise ValueError("its tensor reaches beyond the numbers")
    begin, steps = call.offset * dtype.itemsize, [step * dtype.itemsize for step in steps]
    view: NDArray[Any] = np.ndarray(call.shape, dtype, numbers, begin, steps)
    return StoredTensor(kind, view, math.prod(call.shape) > count, call.negated)


def _tensor(result: Any) -> TensorCall:
    """The result of a program. ValueError if it is not a well-formed dense tensor of floats."""
    refuse_other(result)
    assert isinstance(result, TensorCall)
    sizes = [result.offset, *_tuple(result.shape), *_tuple(result.strides)]
    storage = result.storage
    if (
        not isinstance(storage, Storage)
        or not all(type(size) is int and 0 <= size < 2**63 for size in (*sizes, storage.numel))
        or len(result.shape) != len(result.strides)
    ):
        raise ValueError("its tensor has sizes that are none")
    if storage.kind not in _DTYPES:
        raise Explained(
            f"holds torch.{storage.kind} numbers, expected floating point; save "
            f"{_AS_FLOATS.get(storage.kind, 'tensor.float()')}"
        )
    return result


def _tuple(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, tuple):
        raise ValueError("its tensor has no shape")
    return value
