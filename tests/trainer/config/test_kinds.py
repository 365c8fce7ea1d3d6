"""Kinds of plain values, as the fields of a configuration declare them."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from shardprep_trainer.config.kinds import is_a


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (int, [0, -5], [True, 1.0, "1", None]),
        (float, [0.5, 3], [True, "0.5", None]),
        (bool, [True], [1, None]),
        (str, ["", "a"], [b"a", 1]),
        (int | None, [None, 3], [3.5, "3"]),
        (Literal["a", "b"], ["a"], ["c", 1, ["a"]]),
        (list[str], [[], ["a"]], [("a",), [1], "a"]),
        (tuple[float, float], [(1, 2.5), [0.0, 1.0]], [(1,), (1, 2, 3), (1, "2"), 5]),
    ],
)
def test_a_value_is_of_a_kind_or_is_not(hint: Any, good: list[Any], bad: list[Any]) -> None:
    assert [is_a(value, hint) for value in good] == [True] * len(good)
    assert [is_a(value, hint) for value in bad] == [False] * len(bad)
