"""Whether a plain value, as a checkpoint returns it, is of the type that a field declares."""

from __future__ import annotations

from types import UnionType
from typing import Any, Literal, get_args, get_origin


def is_a(value: Any, hint: Any) -> bool:
    """Whether `value` is of the type `hint`; a list passes for a tuple, an int for a float."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind is Literal:
        return isinstance(value, str) and value in inner
    if kind is UnionType:
        return any(is_a(value, one) for one in inner)
    if kind is list:
        return isinstance(value, list) and all(is_a(item, inner[0]) for item in value)
    if kind is tuple:
        plain = isinstance(value, list | tuple) and len(value) == len(inner)
        return plain and all(map(is_a, value, inner))
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint
