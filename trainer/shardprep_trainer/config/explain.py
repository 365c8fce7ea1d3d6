"""What the parser of the command line found wrong, in plain words: field, found, allowed."""

from __future__ import annotations

import difflib
import re
import typing
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from shardprep_trainer.config.fields import Config, flatten

_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    NoneType: "null",
}
_LISTS: dict[Any, str] = {str: "[tensorboard]"}
_FIELD = re.compile(r'Parser key "([^"]+)"')
# The parser names each type that it tried, and what was given last.
_VALUE = re.compile(r".*(?:Given|Got) value: (.*)|.*?Unable to load config '([^']*)'")
_UNKNOWN = re.compile(r"unrecognized arguments: (.*)|Option '([^']+)' is not accepted")
_LACKING = re.compile(r"argument (--\S+): expected one argument")
_HELP = "--help lists every field with its type"
_MOST_SHOWN = 80


def explain(error: Exception) -> str:
    """An error of jsonargparse as one line: which field, what was found, and what is allowed."""
    text = " ".join(str(error).split())
    field, value = _FIELD.search(text), _VALUE.match(text)
    if field is not None and value is not None and (words := allowed_of(field[1])):
        found = (value[1] or value[2] or "nothing")[:_MOST_SHOWN]
        return f"{field[1]}: found {found}, allowed is {words}"
    if lacking := _LACKING.search(text):
        words = allowed_of(lacking[1].removeprefix("--")) or "a value"
        return f"{lacking[1]}: found nothing, allowed is {words}"
    if unknown := _UNKNOWN.search(text):
        given = unknown[1] or unknown[2]
        return f"{given[:_MOST_SHOWN]}: no such field{_hint(given.split()[0])}; {_HELP}"
    return f"{text.replace('Parser key', 'field')}; {_HELP}"


def allowed_of(name: str) -> str | None:
    """The values that a field takes, in words; None if there is no such field.

    Args:
        name: Its dotted name, such as "optim.lr".
    """
    kind: Any = Config
    for part in name.split("."):
        kind = typing.get_type_hints(kind, include_extras=True).get(part)
        if kind is None:
            return None
    return _words(kind)


def _words(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _words(arguments[0])
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (Union, UnionType):
        return " or ".join(map(_words, arguments))
    if origin is tuple:
        return f"{len(arguments)} numbers in brackets, such as [5, 20]"
    if origin is dict:
        return "a mapping of names to text, numbers, true, false, null, or lists of these"
    if origin is list:
        return f"a list in brackets, such as {_LISTS.get(arguments[0], '[3, 1]')}"
    return _WORDS.get(kind, "a mapping of its fields")


def _hint(given: str) -> str:
    name = given.removeprefix("--").partition("=")[0]
    if not given.startswith("--") and "." not in given:
        return "" if name in flatten(Config().to_dict()) else " (a recipe goes with --config NAME)"
    known = ["config", "resume", "print-config", *flatten(Config().to_dict())]
    # A field is looked for by its own name, too: learning_rate, batch_size.
    near = difflib.get_close_matches(name, known, 1, 0.75) or [
        field for field in known if field.rpartition(".")[2] == name.rpartition(".")[2]
    ]
    return f"; did you mean {near[0]}?" if near else ""
