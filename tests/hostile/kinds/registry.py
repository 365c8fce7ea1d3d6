"""The definition of a kind of hostile input, and the list of all kinds."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

GB = 1 << 30


class Kind(NamedTuple):
    """A kind of hostile input.

    Attributes:
        entry: What it forges: "plain", "zstd" and "uint8" are shard sets, "dataset" is a data set,
            "audio" a folder of recordings, "target" the destination of a build.
        make: Forges the valid set in a folder.
    """

    entry: str
    make: Callable[[Path], None]

    @property
    def sentence(self) -> str:
        return " ".join((self.make.__doc__ or "").split())


KINDS: dict[str, Kind] = {}


def kind(entry: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    def register(make: Callable[[Path], None]) -> Callable[[Path], None]:
        KINDS[make.__name__.replace("_", "-")] = Kind(entry, make)
        return make

    return register


def register(name: str, sentence: str, make: Callable[[Path], None], entry: str = "plain") -> None:
    """Register a function as a kind, with this name and sentence."""
    make.__name__, make.__doc__ = name, sentence
    kind(entry)(make)


class Canary:
    """Makes a file `canary` when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch canary",)
