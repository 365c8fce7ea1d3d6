"""Runs the pickle of a dense tensor on a machine that knows none of Python's functions.

A pickle is a program. This machine takes note of how a tensor is to be put together from its
numbers, and refuses a program that calls for anything else.
"""

from __future__ import annotations

import io
import pickletools
import warnings
from typing import Any, NamedTuple

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
_KINDS = {f"torch {name}Storage": kind for name, kind in _STORAGES.items()}


class _Function(NamedTuple):
    name: str


class Storage(NamedTuple):
    """Where numbers lie: element type by PyTorch's name, key of the record, how many."""

    kind: str
    key: str
    numel: int


class _Mark:
    pass


class TensorCall(NamedTuple):
    """The arguments of the function that puts a tensor together, as the program has them."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any
    negated: bool


def run_pickle(file: io.BytesIO) -> Any:
    """Run one pickle, up to its end.

    Returns:
        What it makes: a TensorCall, or numbers, strings, tuples, lists and dicts.

    Raises:
        ValueError: It is damaged, or no program that `torch.save` writes for a dense tensor.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    with warnings.catch_warnings():
        # Python warns of escapes in strings that no tensor has.
        warnings.simplefilter("ignore", DeprecationWarning)
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
        arguments = stack.pop()
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


def _storage(claim: Any) -> Storage:
    match claim:
        # The older format adds whether it is a view of another, which today's never writes.
        case ("storage", _Function(name), str(key), str(), int(count), *rest) if (
            name in _KINDS and rest in ([], [None])
        ):
            return Storage(_KINDS[name], key, count)
    raise ValueError("its numbers are not stored as those of a dense tensor")


def _called(function: Any, arguments: Any) -> Any:
    if not isinstance(function, _Function) or not isinstance(arguments, tuple):
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
        return TensorCall(storage, offset, shape, strides, notes.get("neg") is True)
    raise ValueError(
        f"its pickle calls {function.name.replace(' ', '.')} otherwise than torch.save"
    )
