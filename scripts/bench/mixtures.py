"""Speed of two sets that are read as one, and of mixtures and balance, against the plain order.

    python -m scripts.bench.mixtures [--utterances 20000] [--out scripts/results/mixtures.json]

The same utterances are packed as one set, and half of them each as two sets. In each round every
loader is measured once, in batches of 256 random segments of 128 frames from the page cache. A
ratio is the median over the rounds, relative to one set in the plain order in the same round; by
the clock, and by the CPU time of all threads, which other programs on the machine disturb less.
Utterances are of many lengths, as in `scripts.bench.loader`; speakers have unequally many.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import msgspec
import numpy as np

import shardprep
from scripts.bench.loader import LONGEST, MEDIAN_LENGTH, SHORTEST, SPREAD
from shardprep.bench.machine import machine

BATCH, FRAMES, N_MELS = 256, 128, 40
SPEAKERS = 600
PLAIN = "one set"
LOADERS: dict[str, tuple[str, dict[str, Any]]] = {
    PLAIN: ("one", {}),
    "two sets": ("two", {}),
    "two sets, shares [1, 1]": ("two", {"shares": [1, 1]}),
    "two sets, shares [3, 1]": ("two", {"shares": [3, 1]}),
    "one set, balance": ("one", {"balance": "speaker"}),
    "two sets, shares [3, 1] and balance": ("two", {"shares": [3, 1], "balance": "speaker"}),
}
"""What is measured: the set or sets, and the options of the loader."""


def utterances(count: int) -> Iterator[tuple[str, str, np.ndarray]]:
    """Key, speaker and matrix of each utterance."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(np.log(MEDIAN_LENGTH), SPREAD, count)).clip(SHORTEST, LONGEST)
    # Numbers of utterances that differ by some ten times from speaker to speaker.
    weights = rng.lognormal(0.0, 0.6, SPEAKERS)
    speakers = rng.choice(SPEAKERS, count, p=weights / weights.sum())
    noise = rng.standard_normal((LONGEST, N_MELS)).astype(np.float16)
    for number, (frames, speaker) in enumerate(zip(lengths.astype(int), speakers, strict=True)):
        yield f"utterance-{number:06d}", f"speaker-{speaker:03d}", noise[:frames] + number % 7


def build(folder: Path, chosen: Iterator[tuple[str, str, np.ndarray]]) -> Path:
    """Pack utterances as one set, all in the split train."""
    with shardprep.ShardWriter(folder, N_MELS, val_fraction=0.0, workers=1) as writer:
        for key, speaker, matrix in chosen:
            writer.add(key, matrix, speaker=speaker)
    return folder


def reader(places: Sequence[Path], options: dict[str, Any]) -> Callable[[], int]:
    """A function that reads one batch and returns its number of segments."""
    split = shardprep.open_shards(places)["train"]
    loader = shardprep.SegmentLoader(split, batch_size=BATCH, segment_frames=FRAMES, **options)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    return lambda: len(next(batches)["label"])


class Rate(NamedTuple):
    """Segments a second."""

    clock: float
    cpu: float


def measure(
    readers: dict[str, Callable[[], int]], rounds: int, seconds: float
) -> dict[str, list[Rate]]:
    """The rate of each reader in each round; the first round is left out as a warm-up."""
    rates: dict[str, list[Rate]] = {name: [] for name in readers}
    for number, (name, batch) in itertools.product(range(rounds + 1), readers.items()):
        batch()
        count, began, cpu = 0, time.perf_counter(), time.process_time()
        while (passed := time.perf_counter() - began) < seconds:
            count += batch()
        if number:
            rates[name].append(Rate(count / passed, count / (time.process_time() - cpu)))
    return rates


def median_ratio(own: Sequence[float], others: Sequence[float]) -> float:
    """The median of the ratios of pairs."""
    return round(statistics.median(a / b for a, b in zip(own, others, strict=True)), 3)


@click.command()
@click.option("--utterances", "count", default=20_000, show_default=True)
@click.option("--rounds", default=60, show_default=True)
@click.option("--seconds", default=0.15, show_default=True, help="Length of each measurement.")
@click.option("--out", type=click.Path(path_type=Path), help="Result file to write (JSON).")
def main(count: int, rounds: int, seconds: float, out: Path | None) -> None:
    """Measure all loaders and print a table."""
    with tempfile.TemporaryDirectory() as folder:
        work, half = Path(folder), count // 2
        sets = {
            "one": [build(work / "all", utterances(count))],
            "two": [
                build(work / "first", itertools.islice(utterances(count), half)),
                build(work / "second", itertools.islice(utterances(count), half, None)),
            ],
        }
        readers = {name: reader(sets[which], own) for name, (which, own) in LOADERS.items()}
        rates = measure(readers, rounds, seconds)
    clock = {name: [rate.clock for rate in own] for name, own in rates.items()}
    cpu = {name: [rate.cpu for rate in own] for name, own in rates.items()}
    rows = [
        {
            "loader": name,
            "segments_per_s": round(statistics.median(clock[name])),
            "ratio": median_ratio(clock[name], clock[PLAIN]),
            "cpu_ratio": median_ratio(cpu[name], cpu[PLAIN]),
        }
        for name in LOADERS
    ]
    click.echo("| loader | segments/s | relative to one set | by CPU time |\n|---|---|---|---|")
    for row in rows:
        click.echo(
            f"| {row['loader']} | {row['segments_per_s']:,} | {row['ratio']:.3f} | "
            f"{row['cpu_ratio']:.3f} |"
        )
    if out is not None:
        result = {
            "machine": msgspec.to_builtins(machine()),
            "utterances": count,
            "speakers": SPEAKERS,
            "rounds": rounds,
            "rows": rows,
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
