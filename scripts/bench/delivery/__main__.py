"""What a loader delivers a second: of a small set, of a large one, and of sets of uint8.

    python -m scripts.bench.delivery [--lengths FILE] [--threads N] [--work FOLDER] [--out FILE]

All ways are measured in one run, in turns, each in a process of its own: batches of 256 random
segments of 128 frames, in shuffled order, from the page cache.

- float16, of the large set and of the small one, whose epochs are short;
- uint8 of the large set, delivered as stored, and widened to float32 on the CPU;
- the limit: copying as many bytes, float16, from random positions of an array in memory.

Besides the segments of a second, those of a second of processor time are counted: where other
programs use the cores too, that is what they disturb least, with `--threads 1`.

The values are noise. The lengths come from a file, or from a log-normal distribution that fits the
homework. With --work, the sets are kept and used again.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

import shardprep
from scripts.bench.loader import LONGEST, MEDIAN_LENGTH, SHORTEST, SPREAD, work_folder
from shardprep.bench.loaders import Batch, SegmentShape, epochs
from shardprep.bench.machine import machine
from shardprep.bench.measure import in_own_process, warm
from shardprep.bench.memory_limit import limit_rows, memory_limit
from shardprep.system import usable_cores

BATCH, FRAMES, BINS, SPEAKERS = 256, 128, 40, 100
# Frames of noise that all utterances are cut from.
NOISE = 20_000
LARGE, SMALL = "float16, {:,} utterances", "float16, {:,} utterances, short epochs"
STORED, WIDENED = "uint8, as stored", "uint8, widened to float32"
LIMIT = "limit: gather from memory"
KINDS = ("of_a_second", "of_a_second_of_processor_time")


def lengths_of(file: Path | None, count: int) -> NDArray[np.int64]:
    """Frames of each of `count` utterances."""
    if file is not None:
        return np.loadtxt(file, dtype=np.int64, max_rows=count)
    drawn = np.random.default_rng(0).normal(np.log(MEDIAN_LENGTH), SPREAD, count)
    return np.exp(drawn).clip(SHORTEST, LONGEST).astype(np.int64)


def pack(folder: Path, dtype: Any, lengths: NDArray[np.int64]) -> Path:
    """A set of noise, made unless it is there."""
    if not (folder / "manifest.json").exists():
        rng = np.random.default_rng(0)
        noise = rng.normal(-4, 3, (NOISE, BINS)).astype(np.float32)
        noise = noise.astype(np.float16) if dtype == "float16" else noise
        with shardprep.ShardWriter(folder, BINS, dtype=dtype, val_fraction=0.0) as writer:
            for number, length in enumerate(lengths.tolist()):
                begin = number * 37 % (NOISE - length)
                mel = noise[begin : begin + length]
                writer.add(f"u{number:06d}", mel, speaker=f"s{number % SPEAKERS}")
    return folder


def deliver(folder: Path, batch: int, dtype: torch.dtype | None) -> Iterator[Batch]:
    """Batches of a set, epoch after epoch."""
    loader = shardprep.SegmentLoader(
        shardprep.open_shards(folder)["train"],
        batch_size=batch,
        segment_frames=FRAMES,
        dtype=dtype,
        rank=0,
        world_size=1,
    )
    for made in epochs(loader):
        yield made["mel"], made["label"]


def rate(start: Callable[[], Iterator[Batch]], threads: int, seconds: float) -> tuple[float, float]:
    """Segments in a second, and in a second of processor time; after as long a warm-up."""
    torch.set_num_threads(threads)
    batches = start()
    counted, passed, used = 0, 0.0, 0.0
    for _ in range(2):
        counted, began, processor = 0, time.perf_counter(), time.process_time()
        while (passed := time.perf_counter() - began) < seconds:
            counted += len(next(batches)[0])
        used = time.process_time() - processor
    return counted / passed, counted / used


def measure(
    lengths: NDArray[np.int64],
    small: int,
    work: Path,
    *,
    batch: int = BATCH,
    threads: int = 1,
    rounds: int = 1,
    seconds: float = 1.0,
) -> dict[str, Any]:
    """The result file: every way in every round, and the medians of the ratios of a round."""
    count = len(lengths)
    large, short = LARGE.format(count), SMALL.format(small)
    ways: dict[str, tuple[Path, torch.dtype | None]] = {
        large: (pack(work / f"float16-{count}", "float16", lengths), None),
        short: (pack(work / f"float16-{small}", "float16", lengths[:small]), None),
        STORED: (pack(work / f"uint8-{count}", "uint8", lengths), torch.uint8),
        WIDENED: (work / f"uint8-{count}", None),
    }
    starts: dict[str, Callable[[], Iterator[Batch]]] = {
        name: partial(deliver, folder, batch, dtype) for name, (folder, dtype) in ways.items()
    }
    shape = SegmentShape(batch, FRAMES, BINS, np.dtype("<f2"))
    rows = limit_rows(int(lengths.sum()) * BINS * shape.dtype.itemsize, shape)
    starts[LIMIT] = partial(memory_limit, rows, shape, "torch.index_select", threads)
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in starts}
    for folder in {folder for folder, _ in ways.values()}:
        warm(sorted(folder.glob("*.tar")))
    for _ in tqdm(range(rounds), desc="rounds", unit="round"):
        for name, start in starts.items():
            task = partial(rate, start, threads, seconds)
            rates[name].append(in_own_process(task, 600 + 10 * seconds))
    compared = {
        "small_to_large": (short, large),
        "large_to_limit": (large, LIMIT),
        "uint8_stored_to_float16": (STORED, large),
        "uint8_widened_to_float16": (WIDENED, large),
    }
    result: dict[str, Any] = {
        **asdict(machine()),
        "utterances": {"large": count, "small": small},
        "batch": [batch, FRAMES, BINS],
        "threads": threads,
        "rounds": rounds,
        "seconds": seconds,
    }
    for at, kind in enumerate(KINDS):
        result[kind] = {
            "segments": {name: [round(one[at]) for one in rates[name]] for name in rates},
            "ratios": {
                name: _ratio([x[at] for x in rates[one]], [x[at] for x in rates[other]])
                for name, (one, other) in compared.items()
            },
        }
    return result


def _ratio(rates: list[float], others: list[float]) -> float:
    """Median of the ratios of each round, whose measurements come one after another."""
    found = [one / other for one, other in zip(rates, others, strict=True)]
    return round(statistics.median(found), 3)


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    seconds, processor = (result[kind] for kind in KINDS)
    rows = ["| delivered | segments a second | of processor time |", "|---|---|---|"]
    for name, rates in seconds["segments"].items():
        own = statistics.median(processor["segments"][name])
        rows.append(f"| {name} | {statistics.median(rates):,.0f} | {own:,.0f} |")
    rows += ["", "| ratio | of segments a second | of processor time |", "|---|---|---|"]
    for name, ratio in seconds["ratios"].items():
        rows.append(f"| {name.replace('_', ' ')} | {ratio:.2f} | {processor['ratios'][name]:.2f} |")
    return "\n".join(rows)


@click.command()
@click.option("--lengths", type=click.Path(exists=True, path_type=Path), help="Lengths in frames.")
@click.option("--utterances", default=56_666, show_default=True, help="Of the large set.")
@click.option("--small", default=8_000, show_default=True, help="Utterances of the small set.")
@click.option("--batch", default=BATCH, show_default=True, help="Segments a batch.")
@click.option("--threads", default=usable_cores(), help="Of PyTorch; all cores by default.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", default=2.0, show_default=True, help="Length of each measurement.")
@click.option("--work", type=click.Path(path_type=Path), help="Keep the sets here.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="JSON to write.")
def main(
    lengths: Path | None,
    utterances: int,
    small: int,
    batch: int,
    threads: int,
    rounds: int,
    seconds: float,
    work: Path | None,
    out: Path | None,
) -> None:
    """Measure all ways and print two tables."""
    with work_folder(work) as folder:
        frames = lengths_of(lengths, utterances)
        result = measure(
            frames,
            small,
            folder,
            batch=batch,
            threads=threads,
            rounds=rounds,
            seconds=seconds,
        )
    click.echo(table(result))
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
