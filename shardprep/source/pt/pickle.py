"""Reads the pickle of a dense tensor without calling any of Python's functions.

A pickle is a program. `run_pickle` interprets it: it notes how the tensor is put together from its
numbers, and refuses a program that names anything else. `usual_call` recognises the one program
that nearly all files have, in a hundredth of the time.
"""

from __future__ import annotations

import io
import pickletools
import re
import warnings
from typing import Any, NamedTuple

# Far more than the pickle of a tensor has.
_MOST_OPCODES = 20_000
_MOST_SHOWN = 40

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
# What else pickles often call for, by the beginning of the name, and what to save instead.
_OTHERS = {
    "numpy": "a NumPy array, not a tensor; save torch.from_numpy(array)",
    "pandas": "a table of pandas, not a tensor; save torch.tensor(table.to_numpy())",
    "torch._utils _rebuild_tensor_v3": "a tensor of a rare element type; save tensor.float()",
    "torch._utils _rebuild_sparse": "a sparse tensor; save tensor.to_dense()",
    "torch._utils _rebuild_qtensor": "a quantized tensor; save tensor.dequantize()",
    "torch._utils _rebuild_nested": "a nested tensor; save each tensor in a file of its own",
    "torch._utils _rebuild_meta": "a tensor without numbers (device meta); save one with numbers",
    "torch._utils _rebuild_device": "a tensor of another device; save tensor.cpu()",
    "torch._tensor _rebuild_from_type": "a tensor of a subclass; save tensor.as_subclass("
    "torch.Tensor)",
    "torch.nn.modules": "a model, not a tensor",
    "__torch__": "a TorchScript program, not a tensor",
}
_INSTEAD: dict[type, str] = {
    list: "save torch.tensor(values), or each tensor in a file of its own",
    tuple: "save the tensor alone",
    set: "save the tensor alone",
    str: "save the tensor alone",
}
# All that a pickle may name.
_GLOBALS = {*_REBUILD, _PARAMETER, _ORDERED_DICT, *_KINDS}

# What `torch.save` writes for a contiguous matrix of floats on the CPU.
_INT = rb"(K.|M..|J....)"
_USUAL = re.compile(
    rb"\x80\x02ctorch\._utils\n_rebuild_tensor_v2\nq\x00\(\(X\x07\x00\x00\x00storageq\x01"
    rb"ctorch\n(Float|Half|Double)Storage\nq\x02X(.)\x00\x00\x00([0-9]{1,20})q\x03"
    rb"X\x03\x00\x00\x00cpuq\x04" + _INT + rb"tq\x05QK\x00" + 2 * _INT + rb"\x86q\x06" + 2 * _INT +
    rb"\x86q\x07\x89ccollections\nOrderedDict\nq\x08\)Rq\ttq\nRq\x0b\.",
    re.DOTALL,
)  # fmt: skip


class Explained(ValueError):
    """What is wrong with a file, as a whole clause that follows the file's name."""


class _Function(NamedTuple):
    name: str


class Storage(NamedTuple):
    """Where the numbers lie.

    Attributes:
        kind: Element type by PyTorch's name.
        key: Name of the record that holds them.
        numel: How many there are.
    """

    kind: str
    key: str
    numel: int


class _Mark:
    pass


class TensorCall(NamedTuple):
    """The arguments that a program gives to the function that puts a tensor together.

    Nothing but the names in the program has been checked: the values may be of any type.
    """

    storage: Any
    offset: Any
    shape: Any
    strides: Any
    negated: bool


def usual_call(program: bytes) -> TensorCall | None:
    """What `run_pickle` makes of the pickle of a plain matrix; None for any other pickle."""
    found = _USUAL.fullmatch(program)
    if found is None:
        return None
    kind, key_size, key, *opcodes = found.groups()
    if key_size[0] != len(key):
        return None
    count, frames, n_mels, *strides = (
        int.from_bytes(opcode[1:], "little", signed=opcode[:1] == b"J") for opcode in opcodes
    )
    storage = Storage(_STORAGES[kind.decode()], key.decode(), count)
    return TensorCall(storage, 0, (frames, n_mels), tuple(strides), False)


def run_pickle(file: io.BytesIO) -> Any:
    """Interpret one pickle, up to its end.

    Returns:
        What it makes: a TensorCall, or numbers, strings, tuples, lists and dicts.

    Raises:
        Explained: The pickle makes something else than a dense tensor, said in words.
        ValueError: The pickle is damaged, or `torch.save` would not write it for a dense tensor.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    with warnings.catch_warnings():
        # Python warns of escapes in strings, which the pickle of a tensor does not have.
        warnings.simplefilter("ignore", DeprecationWarning)
        for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if number >= _MOST_OPCODES:
                _refuse_container(stack)
                raise ValueError("its pickle is longer than that of a tensor")
            try:
                if opcode.name == "STOP":
                    return stack.pop()
                if (
                    opcode.name == "FRAME"
                    and (argument or 0) > file.getbuffer().nbytes - file.tell()
                ):
                    # As if it had been read up to where it is cut off.
                    file.seek(0, io.SEEK_END)
                    raise ValueError("its pickle is cut off")
                _step(opcode.name, argument, stack, memo)
            except (IndexError, KeyError):
                raise ValueError("its pickle is damaged") from None
    raise ValueError("its pickle has no end")


def refuse_other(value: Any) -> None:
    """Explained if a program makes a value that is no tensor; it says what to save instead."""
    if isinstance(value, TensorCall):
        return
    if not isinstance(value, dict):
        kind = type(value).__name__
        held = f"a {kind}" if type(value) in _INSTEAD else f"a value of type {kind}"
        held = "None" if value is None else held
        remedy = _INSTEAD.get(type(value), "save the tensor")
        raise Explained(f"holds {held}, not a tensor; {remedy}")
    keys = list(map(str, value))
    if not keys:
        raise Explained("holds a dict, not a tensor; save the tensor alone")
    if any(key.rpartition(".")[2] in ("weight", "bias") for key in keys):
        raise Explained("holds a dict of the weights of a model (a state_dict), not a tensor")
    tensors = [key for key in keys if isinstance(value[key], TensorCall)]
    shown = ", ".join(ascii(key[:_MOST_SHOWN]) for key in keys[:3]) + ", ..." * (len(keys) > 3)
    what = f"holds a dict, not a tensor (its keys: {shown})"
    if len(tensors) == 1:
        name = ascii(tensors[0][:_MOST_SHOWN])
        raise Explained(f"{what}; save the tensor alone, torch.save(torch.load(FILE)[{name}])")
    raise Explained(f"{what}; save the tensor alone")


def _refuse_container(stack: list[Any], instruction: str = "") -> None:
    """Explained if an unfinished program is making a list, a dict, a set or a tuple of values."""
    if instruction == "EMPTY_SET" and not stack:
        refuse_other(set())
    if stack and type(stack[0]) in (list, dict):
        refuse_other(stack[0])
    if stack and stack[0] is _Mark:
        refuse_other({"LIST": [], "DICT": {}}.get(instruction, ()))


def _step(name: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    if name in _VALUES:
        stack.append(argument)
    elif name in _CONSTANTS:
        stack.append(_CONSTANTS[name])
    elif name in ("EMPTY_LIST", "EMPTY_DICT"):
        stack.append([] if name == "EMPTY_LIST" else {})
    elif name == "MARK":
        stack.append(_Mark)
    elif name in ("BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1]
    elif name == "MEMOIZE":
        memo[len(memo)] = stack[-1]
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
        # The only dict of interest holds what torch.save notes about a tensor, under strings.
        stack[-1].update(
            (key, value)
            for key, value in zip(items[::2], items[1::2], strict=False)
            if isinstance(key, str)
        )
    elif name == "GLOBAL":
        stack.append(_named(argument))
    elif name == "STACK_GLOBAL":
        module, attribute = _popped(stack, 2)
        if not isinstance(module, str) or not isinstance(attribute, str):
            raise ValueError("its pickle is damaged")
        stack.append(_named(f"{module} {attribute}"))
    elif name == "BINPERSID":
        stack.append(_storage(stack.pop()))
    elif name == "REDUCE":
        arguments = stack.pop()
        stack.append(_called(stack.pop(), arguments))
    elif name not in ("PROTO", "FRAME"):
        _refuse_container(stack, name)
        raise ValueError(f"its pickle has the instruction {name}, which no dense tensor needs")


def _named(name: str) -> _Function:
    """The function of a name, "MODULE NAME", if the pickle of a tensor may name it."""
    if name in _GLOBALS:
        return _Function(name)
    for begin, words in _OTHERS.items():
        if name.startswith(begin):
            raise Explained(f"holds {words}")
    shown = name.replace(" ", ".")[:100]
    raise ValueError(
        f"its pickle calls for {shown}, which no dense tensor needs; save the tensor alone"
    )


# Instructions whose argument is a value. Those of text are those of Python 2.
_VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "BINFLOAT",
    "BINUNICODE", "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES",
}  # fmt: skip
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


def _popped(stack: list[Any], count: int | None) -> list[Any]:
    """Remove the last `count` values, or the last mark and the values after it."""
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
        # The older format adds a field for views of another storage. torch.save leaves it empty.
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
