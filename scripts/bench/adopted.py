"""Segments per second from adopted tars, and from a set that was packed of the same matrices.

    python -m scripts.bench.adopted [--utterances 10000] [--work FOLDER]
        [--out scripts/results/adopted.json]

The tars are named and filled as img2dataset does it: 00000.tar, with 000000000.npy, .txt and .json
for each utterance, and PAX headers by webdataset's writer. Both sets are in the page cache. In one
process and one thread, `SegmentLoader` reads an epoch of one and an epoch of the other, in turns:
what else the machine does meets both. The ratio is the median over the pairs. Adopting, in one
process, is compared with reading the same bytes for their sha256. `SegmentDataset` in a DataLoader
without workers is compared with `SegmentLoader` likewise.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import webdataset as wds
from numpy.typing import NDArray
from torch.utils.data import DataLoader

import shardprep
from scripts.bench.loader import BATCH, FRAMES, LONGEST, MEDIAN_LENGTH, SHORTEST, SPREAD
from shardprep.bench.machine import machine

N_MELS, SPEAKERS, PER_TAR = 40, 600, 1000


def matrices(utterances: int) -> Iterator[tuple[str, str, NDArray[np.float16]]]:
    """Key, speaker and matrix (T, F) of each utterance; lengths as those of the homework."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(np.log(MEDIAN_LENGTH), SPREAD, utterances))
    noise = rng.normal(-5, 4, (LONGEST, N_MELS)).astype(np.float16)
    for number, frames in enumerate(lengths.clip(SHORTEST, LONGEST).astype(int)):
        yield f"{number:09d}", f"id{number % SPEAKERS:05d}", noise[:frames]


def write_tars(utterances: int, folder: Path) -> None:
    """Write the tars as img2dataset does."""
    folder.mkdir()
    found = matrices(utterances)
    for number in range(-(-utterances // PER_TAR)):
        with wds.TarWriter(str(folder / f"{number:05d}.tar")) as tar:
            for key, speaker, mel in itertools.islice(found, PER_TAR):
                about = {"key": key, "speaker": speaker, "status": "success", "url": f"u/{key}"}
                tar.write({"__key__": key, "npy": mel, "txt": "a caption", "json": about})


def hash_all(folder: Path) -> float:
    """Seconds that reading and hashing all tars takes."""
    began = time.perf_counter()
    for path in sorted(folder.glob("*.tar")):
        with open(path, "rb") as file:
            hashlib.file_digest(file, "sha256")
    return time.perf_counter() - began


def adopt_again(folder: Path, destination: Path) -> float:
    """Seconds that adopting all tars takes, in one process."""
    began = time.perf_counter()
    shardprep.adopt_shards(folder, destination, workers=1, overwrite=True)
    return time.perf_counter() - began


def seconds_of(batches: Iterable[Any]) -> tuple[float, float]:
    """Seconds that some batches take, by the clock and of the processor."""
    began = time.perf_counter(), time.process_time()
    for _ in batches:
        pass
    return time.perf_counter() - began[0], time.process_time() - began[1]


def compare(readers: dict[str, Iterable[Any]], pairs: int) -> dict[str, NDArray[np.float64]]:
    """Let two readers take turns, each with an epoch; seconds of each (pairs, 2).

    What else the machine does, meets both. The first of a pair changes from pair to pair, and two
    pairs warm up.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in readers}
    for pair in range(pairs + 2):
        for name in sorted(readers, reverse=bool(pair % 2)):
            found[name].append(seconds_of(readers[name]))
    return {name: np.array(values[2:]) for name, values in found.items()}


def ratios(first: NDArray[np.float64], second: NDArray[np.float64]) -> dict[str, Any]:
    """How many times as fast the first of two readers is, over the pairs."""
    by_clock, by_cpu = (second / first).T
    return {
        "ratio": round(float(np.median(by_clock)), 3),
        "ratio_quartiles": np.percentile(by_clock, [25, 75]).round(3).tolist(),
        "ratio_of_cpu_time": round(float(np.median(by_cpu)), 3),
        "ratio_of_cpu_time_quartiles": np.percentile(by_cpu, [25, 75]).round(3).tolist(),
    }


def measure(utterances: int, pairs: int, work: Path) -> dict[str, Any]:
    """Make both sets, and measure them in turns; the result file."""
    torch.set_num_threads(1)
    write_tars(utterances, work / "tars")
    costs: dict[str, list[float]] = {"adopt": [], "sha256": []}
    for _ in range(4):
        costs["sha256"].append(hash_all(work / "tars"))
        costs["adopt"].append(adopt_again(work / "tars", work / "adopted"))
    with shardprep.ShardWriter(work / "built", N_MELS, val_fraction=0) as writer:
        for key, speaker, mel in matrices(utterances):
            writer.add(key, mel, speaker=speaker)
    splits = {name: shardprep.open_shards(work / name)["train"] for name in ("adopted", "built")}
    assert len(splits["adopted"]) == len(splits["built"]) == utterances
    shape = {"batch_size": BATCH, "segment_frames": FRAMES}
    loaders = {name: shardprep.SegmentLoader(split, **shape) for name, split in splits.items()}
    found = compare(dict(loaders), pairs)
    of_dataset = compare(_map_style(splits["built"], loaders["built"]), pairs)
    segments = len(loaders["built"]) * BATCH
    medians = {name: statistics.median(values[1:]) for name, values in costs.items()}
    return {
        **asdict(machine()),
        "utterances": utterances,
        "tar_bytes": sum(path.stat().st_size for path in (work / "tars").iterdir()),
        **shape,
        "pairs": pairs,
        "segments_per_s": _rates(found, segments),
        **ratios(found["adopted"], found["built"]),
        "adopt_s": round(medians["adopt"], 3),
        "sha256_s": round(medians["sha256"], 3),
        "map_style": {
            "segments_per_s": _rates(of_dataset, segments),
            **ratios(of_dataset["SegmentDataset"], of_dataset["SegmentLoader"]),
        },
    }


def _map_style(split: shardprep.Split, loader: shardprep.SegmentLoader) -> dict[str, Any]:
    """The same batches by a DataLoader over the map-style data set, and by the loader."""
    dataset = shardprep.SegmentDataset(split, FRAMES)
    batches: Any = DataLoader(
        dataset, batch_size=BATCH, shuffle=True, drop_last=True, collate_fn=dataset.collate
    )
    return {"SegmentDataset": batches, "SegmentLoader": loader}


def _rates(found: dict[str, NDArray[np.float64]], segments: int) -> dict[str, int]:
    return {name: round(segments / float(np.median(s[:, 0]))) for name, s in found.items()}


@click.command()
@click.option("--utterances", type=click.IntRange(BATCH), default=10_000, show_default=True)
@click.option("--pairs", type=click.IntRange(2), default=40, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), help="Folder for the data, kept.")
@click.option("--out", type=click.Path(path_type=Path), help="Where the result goes, as JSON.")
def main(utterances: int, pairs: int, work: Path | None, out: Path | None) -> None:
    """Measure, print the result and write it to a file."""
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(utterances, pairs, work or Path(temporary))
    text = json.dumps(result, indent=1)
    click.echo(text)
    if out is not None:
        out.write_text(text + "\n")


if __name__ == "__main__":
    main()
