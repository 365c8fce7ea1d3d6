"""Reads the `.pt` file of any dense tensor, in today's or the older format, without unpickling it.

A pickle is a program. Here it runs on a machine that knows none of Python's functions: it takes
note of how a tensor is to be put together from its numbers, and refuses a program that calls for
anything else. Files that `shardprep.ptfile` recognises, nearly all, do not come here.

Nothing is taken at its word: sizes are compared with the bytes at hand before they are used.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardprep.ziprecords import ZIP_MAGIC, DamagedRecord, read_records

# More than the pickle of any tensor has.
_MOST_OPCODES = 20_000

_REBUILD = {"torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2"}
_PARAMETER = "torch._utils _rebuild_parameter"
_ORDERED_DICT = "collections OrderedDict"
_STORAGES = {
    "Half": "float16",
    "Float": "float32",
    "Double": "float64",
    "BFloat16": "bfloat16",
    "Bool": "bool",
    "Byte": "uint8",
    "Char": "int8",
    "Short": "int16",
    "Int": "int32",
    "Long": "int64",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
}
# NumPy has no bfloat16, the upper half of a float32.
_DTYPES = {"float16": "<f2", "float32": "<f4", "float64": "<f8", "bfloat16": "<u2"}
_KINDS = {f"torch {name}Storage": kind for name, kind in _STORAGES.items()}

# What precedes the tensor in the older format: a magic number, a version, facts of the machine.
_OLDER_MAGIC, _OLDER_VERSION = 0x1950A86A20F9469CFC6C, 1001


class _OtherContent(ValueError):
    """The file is in order, and holds something else."""


class _Function(NamedTuple):
    name: str


class _Storage(NamedTuple):
    kind: str
    key: str
    numel: int


class _Mark:
    pass


class _Call(NamedTuple):
    storage: Any
    offset: Any
    shape: Any
    strides: Any
    negated: bool


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file describes it, its numbers where they lie in the file.

    Attributes:
        kind: Element type by PyTorch's name, such as "bfloat16".
        numbers: The numbers, of any shape; bfloat16 as uint16.
        repeats: Whether the tensor has more numbers than the file.
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
        ValueError: The file does not hold just one dense tensor of floating-point numbers; what it
            says completes a sentence that begins with the file's name.
    """
    try:
        return _from_zip(data) if data.startswith(ZIP_MAGIC) else _from_older(data)
    except (_OtherContent, DamagedRecord):
        raise
    except ValueError as error:
        why = str(error)[:200]
        raise ValueError(f"not a tensor file that can be loaded safely: {why}") from None


def _from_zip(data: bytes) -> StoredTensor:
    records = read_records(data)
    if records.get("byteorder", b"little") != b"little":
        raise ValueError("its numbers are big-endian")
    if "data.pkl" not in records:
        raise ValueError("it has no record data.pkl")
    program = io.BytesIO(records["data.pkl"])
    call = _tensor(_run(program))
    if program.read(1):
        raise ValueError("its pickle goes on after its end")
    if f"data/{call.storage.key}" not in records:
        raise ValueError(f"it has no record data/{call.storage.key}")
    return _placed(call, records[f"data/{call.storage.key}"])


def _from_older(data: bytes) -> StoredTensor:
    file = io.BytesIO(data)
    if (_run(file), _run(file)) != (_OLDER_MAGIC, _OLDER_VERSION):
        raise ValueError("it is no file of torch.save")
    _run(file)
    call = _tensor(_run(file))
    keys = _run(file)
    if keys != [call.storage.key]:
        raise ValueError("it has other numbers than those of one tensor")
    begin = file.tell() + 8
    if data[begin - 8 : begin] != struct.pack("<Q", call.storage.numel % 2**64):
        raise ValueError("it has another count of numbers than its pickle says")
    return _placed(call, memoryview(data)[begin:])


def _placed(call: _Call, numbers: memoryview | bytes) -> StoredTensor:
    """The tensor over its numbers, if it stays within them."""
    kind, _, count = call.storage
    dtype = np.dtype(_DTYPES[kind])
    if count * dtype.itemsize != len(numbers):
        raise ValueError(f"it has {len(numbers)} bytes of numbers, but claims {count} of {kind}")
    # The step along an axis of one number does not matter, and may be anything.
    steps = [step if n > 1 else 0 for n, step in zip(call.shape, call.strides, strict=True)]
    last = call.offset + sum((n - 1) * step for n, step in zip(call.shape, steps, strict=True))
    if 0 in call.shape:
        raise _OtherContent(f"has shape {call.shape}, expected numbers")
    if last >= count:
        raise ValueError("its tensor reaches beyond the numbers")
    begin, steps = call.offset * dtype.itemsize, [step * dtype.itemsize for step in steps]
    view: NDArray[Any] = np.ndarray(call.shape, dtype, numbers, begin, steps)
    return StoredTensor(kind, view, math.prod(call.shape) > count, call.negated)


def _tensor(result: Any) -> _Call:
    """The result of a program, if it is a well-formed dense tensor of floats."""
    if not isinstance(result, _Call):
        raise _OtherContent(f"holds a {type(result).__name__}, not a tensor")
    sizes = [result.offset, *_tuple(result.shape), *_tuple(result.strides)]
    storage = result.storage
    if (
        not isinstance(storage, _Storage)
        or not all(type(size) is int and 0 <= size < 2**63 for size in (*sizes, storage.numel))
        or len(result.shape) != len(result.strides)
    ):
        raise ValueError("its tensor has sizes that are none")
    if storage.kind not in _DTYPES:
        raise _OtherContent(f"holds torch.{storage.kind} numbers, expected dense floating point")
    return result


def _tuple(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, tuple):
        raise ValueError("its tensor has no shape")
    return value


def _run(file: io.BytesIO) -> Any:
    """Run one pickle, up to its end; returns what it makes."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if number >= _MOST_OPCODES:
            raise ValueError("its pickle is longer than that of a tensor")
        try:
            if opcode.name == "STOP":
                return stack.pop()
            _step(opcode.name, argument, stack, memo)
        except (IndexError, KeyError):
            raise ValueError("its pickle is damaged") from None
    raise ValueError("its pickle has no end")


def _step(name: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    if name in ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"):
        stack.append(argument)
    elif name in _CONSTANTS:
        stack.append(_CONSTANTS[name])
    elif name in ("EMPTY_LIST", "EMPTY_DICT"):
        stack.append([] if name == "EMPTY_LIST" else {})
    elif name == "MARK":
        stack.append(_Mark)
    elif name in ("BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
        items = _popped(stack, int(name[5:]) if name[5:] else None)
        stack.append(tuple(items))
    elif name in ("APPEND", "APPENDS"):
        items = _popped(stack, 1 if name == "APPEND" else None)
        if type(stack[-1]) is not list:
            raise ValueError("its pickle is damaged")
        stack[-1].extend(items)
    elif name in ("SETITEM", "SETITEMS"):
        items = _popped(stack, 2 if name == "SETITEM" else None)
        if type(stack[-1]) is not dict:
            raise ValueError("its pickle is damaged")
        # Of a dict, only what torch.save notes about a tensor matters.
        stack[-1].update(
            (key, value)
            for key, value in zip(items[::2], items[1::2], strict=False)
            if isinstance(key, str)
        )
    elif name == "GLOBAL":
        if argument not in (*_REBUILD, _PARAMETER, _ORDERED_DICT, *_KINDS):
            named = argument.replace(" ", ".")[:100]
            raise ValueError(f"its pickle calls for {named}, which no dense tensor needs")
        stack.append(_Function(argument))
    elif name == "BINPERSID":
        stack.append(_storage(stack.pop()))
    elif name == "REDUCE":
        arguments = _tuple(stack.pop())
        stack.append(_called(stack.pop(), arguments))
    elif name != "PROTO":
        raise ValueError(f"its pickle has the instruction {name}, which no dense tensor needs")


_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


def _popped(stack: list[Any], count: int | None) -> list[Any]:
    """The last `count` values, or those after the last mark, which goes too."""
    if count is None:
        begin = next((i for i in reversed(range(len(stack))) if stack[i] is _Mark), None)
        if begin is None:
            raise IndexError
        items, stack[begin:] = stack[begin + 1 :], []
        return items
    if count > len(stack):
        raise IndexError
    items, stack[-count:] = stack[-count:], []
    return items


def _storage(claim: Any) -> _Storage:
    match claim:
        # The older format adds whether it is a view of another, which today's never writes.
        case ("storage", _Function(name), str(key), str(), int(count), *rest) if (
            name in _KINDS and rest in ([], [None])
        ):
            return _Storage(_KINDS[name], key, count)
    raise ValueError("its numbers are not stored as those of a dense tensor")


def _called(function: Any, arguments: tuple[Any, ...]) -> Any:
    if not isinstance(function, _Function):
        raise ValueError("its pickle is damaged")
    if function.name == _ORDERED_DICT:
        return {}
    if function.name == _PARAMETER and len(arguments) == 3:
        return arguments[0]
    if function.name in _REBUILD and 4 <= len(arguments) <= 7:
        notes = arguments[6] if len(arguments) > 6 else {}
        if not isinstance(notes, dict) or not notes.keys() <= {"neg", "conj"}:
            raise ValueError("its tensor has properties that are unknown")
        storage, offset, shape, strides = arguments[:4]
        return _Call(storage, offset, shape, strides, notes.get("neg") is True)
    raise ValueError(
        f"its pickle calls {function.name.replace(' ', '.')} otherwise than torch.save"
    )
