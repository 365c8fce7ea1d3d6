"""Reads the text of a JSON file, and says in plain words what is wrong with it."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from shardprep.storage.sniff import server_error, sniff

_MOST_SHOWN = 60
_AGAIN = "copy or download it again"
_PYTHON = {"None": "null", "True": "true", "False": "false"}


def read_object(data: bytes) -> dict[str, Any]:
    """The object in the bytes of a JSON file: UTF-8, or another Unicode by its byte order mark.

    Raises:
        ValueError: It is no JSON, or no object; a clause that follows the file's name.
    """
    try:
        content = json.loads(data, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(_fault(data, error)) from None
    if not isinstance(content, dict):
        raise ValueError(f"is {name_of(content)}, expected a JSON object")
    return content


def refuse_server_error(content: dict[str, Any]) -> None:
    """ValueError if an object that lacks what was expected is the answer of a server."""
    if said := server_error(content):
        raise ValueError(
            f"is an error message of a server ({said}), not the file; download the file itself"
        )


def name_of(value: Any) -> str:
    """A value of JSON, as an error names it."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    return f"the text {value[:_MOST_SHOWN]!a}" if isinstance(value, str) else json.dumps(value)[:40]


def whole_number(value: Any) -> int | None:
    """A number of JSON that is whole, also where it is written as 271.0; None for all else."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if type(value) is int else None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(name for name, count in Counter(n for n, _ in pairs).items() if count > 1)
        raise _DuplicateError(f"the key {twice[:_MOST_SHOWN]!a} occurs twice in one object")
    return content


class _DuplicateError(ValueError):
    """A key occurs twice in an object."""


def _fault(data: bytes, error: Exception) -> str:
    if isinstance(error, _DuplicateError):
        return f"is not valid JSON: {error}"
    found = sniff(data)
    if found is not None and found.kind not in ("json", "text"):
        known = found.kind in ("empty", "zeros", "pointer", "page", "cut", "packed")
        return found.what if known else f"{found.what}, not JSON"
    if 0 < (zeros := len(data) - len(data.rstrip(b"\0"))) < len(data):
        return f"ends in {zeros} zero bytes, as after a crash; {_AGAIN}"
    if isinstance(error, json.JSONDecodeError):
        begins = error.doc[: error.pos].strip() == ""
        if found is not None and begins and error.doc[error.pos : error.pos + 1].isalpha():
            return f"{found.what}, not JSON"
        place = f"line {error.lineno}, column {error.colno}"
        return f"is not valid JSON ({place}): {_hint(error.doc, error.pos, error.msg)}"
    if isinstance(error, UnicodeDecodeError):
        return f"is not valid JSON: byte {error.start} is not UTF-8; save it as UTF-8"
    if isinstance(error, RecursionError):
        return "is not valid JSON: it nests too deep"
    return f"is not valid JSON: {error}"


def _hint(text: str, at: int, message: str) -> str:
    """What is wrong at a place of a text, with a way that works."""
    here = text[at : at + 1]
    if at >= len(text.rstrip()) or message.startswith("Unterminated string"):
        return f"it ends early, as after an aborted download; {_AGAIN}"
    if message.startswith("Extra data"):
        if here in "{[":
            return "it holds several objects (JSON Lines?); expected one object"
        return "more follows after the end of the object; remove it"
    if message.startswith("Illegal trailing comma") or (
        here in "}]" and text[:at].rstrip()[-1:] == ","
    ):
        return "a comma stands before a closing bracket; remove it"
    if message.startswith(("Invalid \\escape", "Invalid \\u")):
        return "a text has a single backslash, as Windows paths have; write / instead"
    if message.startswith("Invalid control character"):
        return "a text has a line break or a tab"
    if text.startswith(("<<<<<<<", "=======", ">>>>>>>"), at):
        return "it has a merge conflict of Git; resolve it"
    if here and here in "\u201c\u201d\u201e":
        return "a text stands in curly quotes; write straight ones"
    if here == "'":
        return "a text stands in single quotes, as Python prints a dict; write it with json.dump"
    if here in "/#":
        return "JSON has no comments; remove it"
    for ours, theirs in _PYTHON.items():
        if text.startswith(ours, at):
            return f"{ours} is Python; write {theirs}, or write the file with json.dump"
    return message[:1].lower() + message[1:]
