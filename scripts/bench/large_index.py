"""Measure opening, memory with a very large index, shuffling, checking, and a cold start.

    python -m scripts.bench.large_index shards/ [--utterances 5000000] [--only PART]...
        [--out scripts/results/scale.json]

- opening: `import shardprep`, and from there to the first batch, each in a new process.
- index: the train split gets an index of --utterances rows, which name the utterances of the same
  shards again and again, and an index of 50,000 rows. Measured are the segments a second with both
  indexes, and the memory of the process without the mapped pages.
- shuffle: repeat pairs relative to chance, for several numbers of lanes and sizes of the shuffle
  window. A repeat pair is two utterances that share a batch in two consecutive epochs of the
  windowed order.
- checking: two epochs with each `verify_reads`, with the shards in memory.
- cold (needs root, to drop the page cache): an epoch in windowed and in global order, beside `cat`
  of the same shards.

In each round every variant is measured once; results are medians over the rounds.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np

import shardprep
from shardprep.bench.machine import machine
from shardprep.format.manifest import MANIFEST_NAME, encode_manifest
from shardprep.load.orders.epoch import Indices
from shardprep.load.orders.windowed import WindowedOrder
from shardprep.read.manifest_file import load_manifest

SMALL = 50_000
DROP = Path("/proc/sys/vm/drop_caches")

IMPORT = """
import time
began = time.perf_counter()
import shardprep
print(time.perf_counter() - began)
"""

# Imports do not count: the time is from opening the set to the first batch.
OPEN = """
import sys, time
import shardprep
shardprep.open_shards, shardprep.SegmentLoader
import torch
torch.zeros(8).index_select(0, torch.arange(2))
began = time.perf_counter()
split = shardprep.open_shards(sys.argv[1])["train"]
opened = time.perf_counter()
next(iter(shardprep.SegmentLoader(split, batch_size=256)))
print(opened - began, time.perf_counter() - began)
"""

# RssAnon is the memory of the process without the pages of mapped files.
READ = """
import itertools, re, sys, time
import shardprep, torch
def held():
    status = open("/proc/self/status").read()
    return int(re.search(r"RssAnon:\\s+(\\d+)", status)[1]) * 1024
shardprep.open_shards, shardprep.SegmentLoader
torch.zeros(8).index_select(0, torch.arange(2))
before = held()
split = shardprep.open_shards(sys.argv[1])["train"]
loader = shardprep.SegmentLoader(split, batch_size=256, order=sys.argv[3])
batches = itertools.chain.from_iterable(itertools.repeat(loader))
def rate(seconds):
    count, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds:
        next(batches)
        count += 256
    return count / passed
rate(float(sys.argv[2]))
print(rate(float(sys.argv[2])), held() - before)
"""

EPOCH = """
import sys, time
import shardprep, torch
shardprep.open_shards, shardprep.SegmentLoader
began = time.perf_counter()
split = shardprep.open_shards(sys.argv[1])["train"]
loader = shardprep.SegmentLoader(split, batch_size=256, order=sys.argv[2])
for batch in loader:
    pass
print(time.perf_counter() - began)
"""

CHECK = """
import sys, time
import shardprep, torch
shardprep.open_shards, shardprep.SegmentLoader
split = shardprep.open_shards(sys.argv[1])["train"]
loader = shardprep.SegmentLoader(split, batch_size=256, verify_reads=sys.argv[2])
for _ in range(2):
    began = time.perf_counter()
    for batch in loader:
        pass
    print(len(loader) * 256 / (time.perf_counter() - began))
"""


def run(script: str, *arguments: object) -> list[float]:
    """The numbers that a script prints, in a new process."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return [float(word) for word in subprocess.check_output(command, text=True).split()]


def repeat(shards: Path, target: Path, utterances: int) -> None:
    """Write a set whose index names the utterances of `shards` again and again."""
    manifest = load_manifest(shards)
    train = manifest.splits["train"]
    for shard in train.shards:
        (target / shard.file).symlink_to((shards / shard.file).resolve())
    rows = np.resize(np.load(shards / train.index.file, mmap_mode="r"), utterances)
    path = target / train.index.file
    np.save(path, rows)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    index = msgspec.structs.replace(train.index, bytes=path.stat().st_size, sha256=digest)
    frames = int(rows["frames"].sum(dtype=np.int64))
    split = msgspec.structs.replace(train, samples=utterances, frames=frames, index=index)
    whole = msgspec.structs.replace(manifest, splits={"train": split}, rejects=None)
    (target / MANIFEST_NAME).write_bytes(encode_manifest(whole))


def opening(shards: Path, rounds: int) -> dict[str, float]:
    """Median seconds that importing and opening take, with the shards in memory."""
    for shard in shards.glob("*.tar"):
        shard.read_bytes()
    imports = [run(IMPORT)[0] for _ in range(rounds)]
    opens = [run(OPEN, shards) for _ in range(rounds)]
    return {
        "import_s": statistics.median(imports),
        "open_s": statistics.median(opened for opened, _ in opens),
        "first_batch_s": statistics.median(first for _, first in opens),
    }


def large_index(shards: Path, utterances: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Speed and memory with a small and with a large index."""
    found: dict[int, list[list[float]]] = {SMALL: [], utterances: []}
    with tempfile.TemporaryDirectory() as folder:
        for size in found:
            (Path(folder) / str(size)).mkdir()
            repeat(shards, Path(folder) / str(size), size)
        for _ in range(rounds):
            for size, results in found.items():
                results.append(run(READ, Path(folder) / str(size), seconds, "global"))
    rate = {size: statistics.median(r for r, _ in results) for size, results in found.items()}
    held = {size: statistics.median(h for _, h in results) for size, results in found.items()}
    return {
        "utterances": [SMALL, utterances],
        "segments_per_s": [round(value) for value in rate.values()],
        "ratio": rate[utterances] / rate[SMALL],
        "held_mb": [value / 1e6 for value in held.values()],
        "bytes_an_utterance_more": (held[utterances] - held[SMALL]) / (utterances - SMALL),
    }


def checking(shards: Path, rounds: int) -> list[dict[str, Any]]:
    """Segments a second of the first and the second epoch, for each `verify_reads`."""
    for shard in shards.glob("*.tar"):
        shard.read_bytes()
    found: dict[str, list[list[float]]] = {"never": [], "once": [], "always": []}
    for _ in range(rounds):
        for choice, results in found.items():
            results.append(run(CHECK, shards, choice))
    return [
        {
            "verify_reads": choice,
            "first_epoch_per_s": round(statistics.median(first for first, _ in results)),
            "second_epoch_per_s": round(statistics.median(second for _, second in results)),
        }
        for choice, results in found.items()
    ]


def cold(shards: Path, rounds: int) -> dict[str, float] | None:
    """Bytes a second of `cat` and of an epoch; None without permission to drop the cache."""
    if not os.access(DROP, os.W_OK):
        return None
    infos = load_manifest(shards).splits["train"].shards
    files, size = [str(shards / info.file) for info in infos], sum(info.bytes for info in infos)

    def cat() -> float:
        began = time.perf_counter()
        with open(os.devnull, "wb") as nowhere:
            subprocess.run(["cat", *files], stdout=nowhere, check=True)
        return time.perf_counter() - began

    ways: dict[str, Callable[[], float]] = {
        "cat": cat,
        "windowed": lambda: run(EPOCH, shards, "windowed")[0],
        "global": lambda: run(EPOCH, shards, "global")[0],
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            os.sync()
            DROP.write_text("3")
            seconds[name].append(way())
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        **{f"{name}_mb_per_s": size / 1e6 / value for name, value in medians.items()},
        "windowed_to_cat": medians["cat"] / medians["windowed"],
        "global_to_cat": medians["cat"] / medians["global"],
    }


def repeat_pairs(one: Indices, other: Indices, batch: int) -> float:
    """Repeat pairs of two epochs relative to chance, from a sample of pairs."""
    n = len(one)
    place = np.empty(n, np.int64)
    place[other] = np.arange(n) // batch
    rows = one[: n // batch * batch].reshape(-1, batch)
    rng = np.random.default_rng(0)
    row = rng.integers(0, len(rows), 2_000_000)
    first, second = rows[row, rng.integers(0, batch, (2, len(row)))]
    pairs = first != second
    return float((place[first] == place[second])[pairs].mean() * n / batch)


def shuffle_quality(samples: tuple[int, ...], batch: int = 256) -> list[dict[str, float]]:
    """Repeat pairs in the windowed order of shards of these sizes."""
    found = []
    for lanes, window in itertools.product((1, 4, 8), (1, 2, 4, 8)):
        one, other = (
            WindowedOrder(samples, 0, epoch, global_batch=batch, lanes=lanes, window_shards=window)(
                np.arange(sum(samples))
            )
            for epoch in (0, 1)
        )
        ratio = repeat_pairs(one, other, batch)
        found.append({"lanes": lanes, "window_shards": window, "repeat_pairs_to_chance": ratio})
    return found


PARTS = ("opening", "index", "shuffle", "checking", "cold")


@click.command()
@click.argument("shards", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--utterances", default=5_000_000, show_default=True, help="Rows of the large index.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--seconds", default=3.0, show_default=True, help="Length of each measurement.")
@click.option("--only", multiple=True, type=click.Choice(PARTS), default=PARTS)
@click.option("--out", type=click.Path(path_type=Path), help="Result file to write (JSON).")
def main(
    shards: Path,
    utterances: int,
    rounds: int,
    seconds: float,
    only: tuple[str, ...],
    out: Path | None,
) -> None:
    """Measure SHARDS, and print the result as JSON."""
    train = shardprep.open_shards(shards)["train"]
    parts: dict[str, Callable[[], Any]] = {
        "opening": lambda: opening(shards, rounds),
        "index": lambda: large_index(shards, utterances, rounds, seconds),
        "shuffle": lambda: shuffle_quality(train.shard_samples),
        "checking": lambda: checking(shards, rounds),
        "cold": lambda: cold(shards, rounds),
    }
    result = {
        "machine": msgspec.to_builtins(machine()),
        "set": {"utterances": len(train), "codec": load_manifest(shards).codec.name},
        **{name: parts[name]() for name in PARTS if name in only},
    }
    text = json.dumps(result, indent=2) + "\n"
    click.echo(text, nl=False)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)


if __name__ == "__main__":
    main()
