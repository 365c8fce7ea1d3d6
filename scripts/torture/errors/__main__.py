"""Let every call that may fail do so, with every errno, in every command, and judge what comes.

    python -m scripts.torture.errors [--only COMMAND]... [--kind KIND]... [--out FILE.json]

The calls are those of `failing_calls.KINDS` on files below the folder of a command, the commands
those of `commands.COMMANDS`, each once without errors, to count its calls. Then the first, a middle
and the last call of each kind fail with each errno: once, and in a second matrix that call and all
later ones of its kind on the same path. Every cell of the matrix is one of these:

- works: exit code 0 and the result of an undisturbed run.
- works with a note: the same, and a line of output that an undisturbed run does not have.
- exit 6 with a remedy: the remedy fits the errno, and the same command succeeds afterwards. That is
  tried once for each call and place.
- not reached: the command has no such call.
- wrong: everything else. A file that was healthy is gone or another, the message speaks of damage,
  there is a traceback, the result is another, or the command does not end.
- wrong once: wrong, but not when it was tried again.

--out writes the counts, every wrong cell and the table in JSON, and the table in Markdown beside
it. Needs gcc. Exit codes: 0 no cell is wrong, 1 some are, 2 usage.
"""

from __future__ import annotations

import contextlib
import json
import queue
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from scripts.servers.object_store import ObjectStore, object_store
from scripts.torture.errors.commands import COMMANDS, SHARDS, make_template
from scripts.torture.errors.failing_calls import (
    KINDS,
    FailingCalls,
    can_compile,
    compile_library,
)
from scripts.torture.errors.fork_server import ForkServer, fork_server
from scripts.torture.errors.matrix import (
    COMMANDS_MODULE,
    ERRORS,
    UNSTEADY,
    WRONG,
    Cell,
    Matrix,
    Outcome,
    cells,
    table,
    tally,
)
from shardprep.bench.machine import machine

MODES = {"once": False, "lasting": True}
# Of the set: files must leave the cache while it is read.
_CACHE_SHARE = 0.6
Found = dict[Cell, Outcome]


def serve_shards(store: ObjectStore, shards: Path) -> str:
    """Put a set into a store; returns its address for web clients."""
    url = store.http_url(SHARDS)
    for path in shards.iterdir():
        request = urllib.request.Request(f"{url}/{path.name}", path.read_bytes(), method="PUT")
        with urllib.request.urlopen(request):
            pass
    return url


def try_all(asked: Sequence[Cell], folder: Path, jobs: int) -> Found:
    """Try cells in some processes at a time.

    Args:
        asked: The cells.
        folder: An empty folder.
        jobs: How many at a time.
    """
    template, places = folder / "template", [folder / f"job{number}" for number in range(jobs)]
    parts = {part for cell in asked for part in cell.command.parts}
    library = compile_library(folder)
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(fork_server(library, own / "output")) for own in places]
        make_template(template, parts, lambda words: _run(servers[0], words, folder))
        shards, url = template / SHARDS, ""
        if any(cell.command.is_remote for cell in asked):
            url = serve_shards(stack.enter_context(object_store(folder / "store")), shards)
        cache_bytes = int(_CACHE_SHARE * sum(path.stat().st_size for path in shards.iterdir()))
        free: queue.SimpleQueue[Matrix] = queue.SimpleQueue()
        for server, own in zip(servers, places, strict=True):
            free.put(Matrix(server, template, own, url, cache_bytes))

        def attempt(cell: Cell) -> Outcome:
            matrix = free.get()
            try:
                outcome = matrix.try_cell(cell)
            finally:
                free.put(matrix)
            if outcome.what in (WRONG, UNSTEADY):
                tqdm.write(" | ".join(described(cell, outcome)), file=sys.stderr)
            return outcome

        threads = stack.enter_context(ThreadPoolExecutor(jobs))
        outcomes = threads.map(attempt, asked)
        return dict(zip(asked, tqdm(outcomes, total=len(asked), disable=None), strict=True))


def _run(server: ForkServer, words: Sequence[str], folder: Path) -> None:
    """Run a command of `shardprep` in which nothing fails.

    Raises:
        RuntimeError: It fails all the same.
    """
    nothing = FailingCalls(folder / "calls", folder)
    ended = server.run(COMMANDS_MODULE, "shardprep_command", words, nothing)
    if ended.code:
        raise RuntimeError(f"{words[0]} fails without errors:\n{ended.err}")
    server.learn()


def described(cell: Cell, outcome: Outcome) -> tuple[str, ...]:
    """What somebody needs to know who mends a cell."""
    mode = "lasting" if cell.lasting else "once"
    place = f"{cell.place} {cell.kind}"
    name, what = cell.command.name, f"{outcome.what}: {outcome.why}"
    return name, place, cell.error, mode, outcome.path, what, outcome.said


def summary(found: Mapping[Cell, Outcome]) -> dict[str, Any]:
    """Counts by command, and all that is wrong."""
    names = dict.fromkeys(cell.command.name for cell in found)
    own = {name: {c: o for c, o in found.items() if c.command.name == name} for name in names}
    return {
        "cells": len(found),
        "counts": tally(found),
        "by_command": {name: tally(part) for name, part in own.items()},
        "wrong": _rows(found, WRONG),
        "wrong_once": _rows(found, UNSTEADY),
    }


def _rows(found: Mapping[Cell, Outcome], what: str) -> list[dict[str, Any]]:
    """All that is known of the cells of a class."""
    return [
        {
            "command": cell.command.name,
            "call": cell.kind,
            "errno": cell.error,
            "place": cell.place,
            **asdict(outcome),
        }
        for cell, outcome in found.items()
        if outcome.what == what
    ]


@click.command(context_settings={"show_default": True})
@click.option(
    "--only",
    multiple=True,
    type=click.Choice([command.name for command in COMMANDS]),
    default=[command.name for command in COMMANDS],
    show_default="all",
    help="Only these commands.",
)
@click.option(
    "--kind",
    multiple=True,
    type=click.Choice(KINDS),
    default=KINDS,
    show_default="all",
    help="Only these calls.",
)
@click.option(
    "--errno",
    "errors",
    multiple=True,
    type=click.Choice(ERRORS),
    default=ERRORS,
    show_default="all",
    help="Only these errors.",
)
@click.option("--mode", multiple=True, type=click.Choice(list(MODES)), default=list(MODES))
@click.option("--jobs", type=click.IntRange(min=1), default=2, help="Commands at a time.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Result (JSON).")
def main(
    only: tuple[str, ...],
    kind: tuple[str, ...],
    errors: tuple[str, ...],
    mode: tuple[str, ...],
    jobs: int,
    out: Path | None,
) -> None:
    """Let every call that may fail do so, with every errno, in every command."""
    if not can_compile():
        raise click.UsageError("needs gcc, to compile failing_calls.c: install it")
    commands = [command for command in COMMANDS if command.name in only]
    asked = [
        cell
        for name in mode
        for cell in cells(commands, lasting=MODES[name])
        if cell.kind in kind and cell.error in errors
    ]
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="errors-") as folder:
        found = try_all(asked, Path(folder), jobs)
    results, tables = {}, []
    for name in mode:
        own = {c: outcome for c, outcome in found.items() if c.lasting == MODES[name]}
        results[name] = summary(own)
        tables.append(f"## {name}\n\n{table(own, commands)}\n")
        click.echo(f"{name}: {results[name]['counts']}")
    if out is not None:
        about = {**asdict(machine()), "jobs": jobs, "seconds": round(time.monotonic() - began)}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({**about, **results}, indent=1) + "\n")
        out.with_suffix(".md").write_text("\n".join(tables))
    sys.exit(any(result["wrong"] for result in results.values()))


if __name__ == "__main__":
    main()
