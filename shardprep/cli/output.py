"""What the commands share: progress on stderr, numbers in words, JSON on stdout."""

from __future__ import annotations

import json
import re
from typing import Any

import click
import msgspec
from tqdm import tqdm

from shardprep.format.manifest import Features, frames_per_second

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def size(nbytes: float) -> str:
    """Bytes in words, e.g. 3.2 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"


def hours(frames: int, features: Features | None) -> str:
    """Mel frames as hours of speech."""
    return f"{frames / frames_per_second(features) / 3600:.2f} h"


def count(number: int, noun: str) -> str:
    """A number of things, e.g. 1 utterance or 2 utterances."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def one_line(text: str) -> str:
    """A text with names from files, which must not move the cursor of a terminal."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def print_json(content: Any) -> None:
    """Print dataclasses, structs and builtins as JSON on stdout."""
    click.echo(json.dumps(msgspec.to_builtins(content), indent=2))


def progress_bar(total: int, unit: str, description: str) -> Any:
    """A progress bar on stderr; silent where stderr is not a terminal."""
    scaled = unit == "B"
    return tqdm(
        total=total,
        unit=unit,
        unit_scale=scaled,
        unit_divisor=1024 if scaled else 1000,
        desc=description,
        disable=None,
        dynamic_ncols=True,
    )
