"""Segments per second of every way to read the same data set, measured in one run.

    python scripts/bench_loader.py [--dataset Dataset/] [--out scripts/results/loader.json]

All loaders give batches of 256 random crops of 128 frames, short utterances padded with -20, from
the same utterances on a warm page cache:

- a .pt file a sample, as the course's own Dataset and DataLoader do it, with 0 and 2 workers;
- webdataset over our shards, decoded by `shardprep.stream`, with 0 and 2 workers;
- `shardprep.SegmentLoader` in one process, for float16 shards of both codecs;
- the limit: a gather of as many bytes at random positions of an array in memory.

Without --dataset, one is synthesised: smooth random matrices with lengths drawn from a log-normal
distribution fitted to the homework (median 540 frames). Loaders take turns, round by round; the
table shows medians over the rounds, and ratios to the fastest file-by-file loader.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

import shardprep

BATCH, FRAMES, N_MELS, PAD = 256, 128, 40, -20.0
MEDIAN_LENGTH, SPREAD, SHORTEST, LONGEST = 540, 0.5, 91, 7193


class FileDataset(Dataset[tuple[torch.Tensor, int]]):
    """One .pt file a sample, opened when asked for, as the course's code has it."""

    def __init__(self, root: Path) -> None:
        metadata = json.loads((root / "metadata.json").read_text())["speakers"]
        self.samples = [
            (root / entry["feature_path"], label)
            for label, entries in enumerate(metadata.values())
            for entry in entries
        ]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self.samples[index]
        return crop(torch.load(path, weights_only=True)), label


def crop(mel: torch.Tensor) -> torch.Tensor:
    """A random segment (at most FRAMES, F) of an utterance (T, F)."""
    start = random.randint(0, max(len(mel) - FRAMES, 0))
    return mel[start : start + FRAMES]


def collate(samples: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad to the longest segment and stack: (B, T, F) and (B,)."""
    mels, labels = zip(*samples, strict=True)
    return pad_sequence(list(mels), batch_first=True, padding_value=PAD), torch.tensor(labels)


def from_stream(sample: dict[str, Any]) -> tuple[torch.Tensor, int]:
    """Crop a sample of `shardprep.stream`."""
    return crop(torch.from_numpy(sample["mel"])), sample["label"]


def file_loader(root: Path, workers: int) -> Iterator[Any]:
    """Batches for ever from the folder of files."""
    loader = DataLoader(
        FileDataset(root),
        BATCH,
        shuffle=True,
        drop_last=True,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    while True:
        yield from loader


def webdataset_loader(shards: Path, workers: int) -> Iterator[Any]:
    """Batches for ever from webdataset."""
    dataset = shardprep.stream(shards, shuffle=1000).map(from_stream)
    loader = DataLoader(
        dataset.batched(BATCH, collation_fn=collate, partial=False),
        batch_size=None,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    while True:
        yield from loader


def our_loader(shards: Path) -> Iterator[Any]:
    """Batches for ever from shardprep."""
    split = shardprep.open_shards(shards)["train"]
    loader = shardprep.SegmentLoader(split, batch_size=BATCH, segment_frames=FRAMES)
    while True:
        yield from loader


def memory_limit(frames: int) -> Iterator[Any]:
    """Gathers for ever as many rows of as many bytes from an array as large as the data set."""
    rows = np.ones((max(frames // FRAMES, BATCH), FRAMES * N_MELS), np.float16)
    out = np.empty((BATCH, FRAMES * N_MELS), np.float16)
    rng = np.random.default_rng(0)
    while True:
        np.take(rows, rng.integers(0, len(rows), BATCH), axis=0, out=out)
        yield out


def synthesise(root: Path, utterances: int, speakers: int) -> None:
    """Write a data set of smooth random matrices in the homework's layout."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(np.log(MEDIAN_LENGTH), SPREAD, utterances)).astype(int)
    entries: dict[str, list[dict[str, object]]] = {f"id{n:05d}": [] for n in range(speakers)}
    root.mkdir(parents=True)
    for number, length in enumerate(lengths.clip(SHORTEST, LONGEST)):
        steps = rng.normal(0, 0.6, (length, N_MELS)).astype(np.float32)
        mel = torch.from_numpy(np.clip(steps.cumsum(0), -14, 9))
        name = f"uttr-{hashlib.md5(str(number).encode()).hexdigest()}.pt"
        torch.save(mel, root / name)
        entries[f"id{number % speakers:05d}"].append({"feature_path": name, "mel_len": int(length)})
    (root / "metadata.json").write_text(json.dumps({"n_mels": N_MELS, "speakers": entries}))


def measure(batches: Iterator[Any], seconds: float) -> float:
    """Segments per second over a stretch of time."""
    count, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds:
        next(batches)
        count += BATCH
    return count / passed


def run(dataset: Path, work: Path, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Build the shards, then let all loaders take turns."""
    for codec in ("none", "zstd"):
        options = shardprep.BuildOptions(codec=codec, val_fraction=0.0, samples_per_shard=500)
        shardprep.build_shards(dataset, work / codec, options)
    split = shardprep.open_shards(work / "none")["train"]
    loaders: dict[str, Callable[[], Iterator[Any]]] = {
        "files, 0 workers": lambda: file_loader(dataset, 0),
        "files, 2 workers": lambda: file_loader(dataset, 2),
        "webdataset, 0 workers": lambda: webdataset_loader(work / "none", 0),
        "webdataset, 2 workers": lambda: webdataset_loader(work / "none", 2),
        "shardprep zstd, one process": lambda: our_loader(work / "zstd"),
        "shardprep, one process": lambda: our_loader(work / "none"),
        "limit: gather from memory": lambda: memory_limit(int(split.frames.sum())),
    }
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for number in range(rounds):
        for name, start in loaders.items():
            # A fresh start each time, so that no worker of one loader runs beside another.
            batches = start()
            measure(batches, seconds / 2)
            rates[name].append(measure(batches, seconds))
            del batches
            click.echo(f"round {number + 1}: {name}: {rates[name][-1]:,.0f}/s", err=True)
    return rates


def summarise(rates: dict[str, list[float]], dataset: dict[str, object]) -> dict[str, Any]:
    """The result file's content: medians and ratios, hardware and date."""
    medians = {name: statistics.median(values) for name, values in rates.items()}
    files = max(rate for name, rate in medians.items() if name.startswith("files"))
    limit = medians["limit: gather from memory"]
    return {
        "date": date.today().isoformat(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        "dataset": dataset,
        "batch": [BATCH, FRAMES, N_MELS],
        "loaders": {
            name: {
                "segments_per_s": round(rate),
                "rounds": [round(value) for value in rates[name]],
                "to_files": round(rate / files, 2),
                "to_limit": round(rate / limit, 4),
            }
            for name, rate in medians.items()
        },
    }


def cpu_name() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@click.command()
@click.option(
    "--dataset", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Data to read."
)
@click.option("--utterances", default=6000, show_default=True, help="Files to synthesise, if none.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", default=3.0, show_default=True, help="Length of a measurement.")
@click.option("--out", type=click.Path(path_type=Path), help="Result file to write (JSON).")
def main(
    dataset: Path | None, utterances: int, rounds: int, seconds: float, out: Path | None
) -> None:
    """Measure all loaders and print a table."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        kind = "given folder"
        if dataset is None:
            kind, dataset = "synthesised", work / "Dataset"
            synthesise(dataset, utterances, speakers=60)
        rates = run(dataset, work, rounds, seconds)
        split = shardprep.open_shards(work / "none")["train"]
        about = {"kind": kind, "utterances": len(split), "frames": int(split.frames.sum())}
    result = summarise(rates, about)
    click.echo("| loader | segments/s | to the files | to the limit |\n|---|---|---|---|")
    for name, row in result["loaders"].items():
        click.echo(
            f"| {name} | {row['segments_per_s']:,} | {row['to_files']:.1f}x "
            f"| {row['to_limit']:.3f} |"
        )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
