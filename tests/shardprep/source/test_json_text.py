"""What is wrong with a JSON file is said with place, cause and a way that works."""

from __future__ import annotations

import json

import pytest

from shardprep.source.json_text import name_of, read_object, whole_number

FAULTS: dict[str, tuple[str | bytes, str]] = {
    "comment": ('{"a": 1, // one\n"b": 2}', "(line 1, column 10): JSON has no comments; remove it"),
    "hash": ('{\n# one\n"b": 2}', "(line 2, column 1): JSON has no comments"),
    "comma in an object": ('{"a": 1,\n}', "a comma stands before a closing bracket; remove it"),
    "comma in a list": ('{"a": [1, ]}', "a comma stands before a closing bracket; remove it"),
    "single quotes": ("{'a': 1}", "(line 1, column 2): a text stands in single quotes"),
    "Python": ('{"a": None}', "(line 1, column 7): None is Python; write null"),
    "backslash": ('{"a": "s\\x.pt"}', "a text has a single backslash, as Windows paths have"),
    "backslash and u": ('{"a": "s\\u0.pt"}', "a text has a single backslash"),
    "JSON Lines": ('{"a": 1}\n{"b": 2}\n', "(line 2, column 1): it holds several objects"),
    "more": ('{"a": 1}}', "more follows after the end of the object"),
    "cut": ('{"a": [1, 2', "it ends early, as after an aborted download; copy or download it"),
    "cut in a text": ('{"a": "bc', "it ends early"),
    "other": ('{"a" 1}', "(line 1, column 6): expecting ':' delimiter"),
    "tab": ('{"a": "b\tc"}', "a text has a line break or a tab"),
    "encoding": ('{"a": "é"}'.encode("latin-1"), "byte 7 is not UTF-8; save it as UTF-8"),
    "twice": ('{"a": 1, "a": 2}', "the key 'a' occurs twice in one object"),
    "text": ("n_mels: 40", "is text that begins 'n_mels: 40', not JSON"),
    "merge conflict": ("<<<<<<< HEAD\n{}\n", "(line 1, column 1): it has a merge conflict of Git"),
    "conflict within": ("{\n=======\n}", "(line 2, column 1): it has a merge conflict of Git"),
    "curly quotes": ("{\u201ca\u201d: 1}", "(line 1, column 2): a text stands in curly quotes"),
    "zeros": ('{"a": 1}' + "\0" * 3, "ends in 3 zero bytes, as after a crash"),
    "list": ("[1]", "is a list, expected a JSON object"),
    "number": ("1", "is 1, expected a JSON object"),
    "empty": ("", "is empty (0 bytes)"),
    "NumPy": (b"\x93NUMPY\1\0", "is a NumPy file (.npy), not JSON"),
    "zip": (b"PK\3\4a", "is a zip archive, not JSON"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_explained(name: str) -> None:
    text, said = FAULTS[name]
    with pytest.raises(ValueError, match="^(is|ends in) ") as error:
        read_object(text if isinstance(text, bytes) else text.encode())
    assert said in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_any_unicode_is_read(encoding: str) -> None:
    content = {"n_mels": 40, "speakers": {"Zoë": []}}
    assert read_object(json.dumps(content, ensure_ascii=False).encode(encoding)) == content


@pytest.mark.parametrize(
    ("value", "number"),
    [(271, 271), (271.0, 271), (-1.0, -1), (271.5, None), ("271", None), (True, None), (None, None)]
    + [(float("nan"), None), (float("inf"), None), ([], None)],
)
def test_whole_numbers_may_be_written_with_a_fraction_of_zero(
    value: object, number: int | None
) -> None:
    assert whole_number(value) == number
    assert type(whole_number(value)) is type(number)


def test_values_are_named_as_they_are_written() -> None:
    values = {"null": None, "true": True, "NaN": float("nan"), "a list": [1], "an object": {}}
    assert {name: name_of(value) for name, value in values.items()} == {n: n for n in values}
    assert name_of("a" * 500) == f"the text '{'a' * 60}'"
