"""Segments per second from adopted tars, and from a set that was packed of the same matrices.

    python -m scripts.bench.adopted [--utterances 10000] [--work FOLDER]
        [--out scripts/results/adopted.json]

The tars are named and filled as img2dataset does it: 00000.tar, with 000000000.npy, .txt and .json
for each utterance, and PAX headers by webdataset's writer. Both sets are in the page cache. In one
process and one thread, `SegmentLoader` reads an epoch of one and an epoch of the other, in turns:
what else the machine does meets both. The ratio is the median over the pairs. Adopting, in one
process, is compared with reading the same bytes for their sha256.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import webdataset as wds
from numpy.typing import NDArray

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


def epoch_rate(loader: shardprep.SegmentLoader) -> float:
    """Segments per second of an epoch."""
    began, count = time.perf_counter(), 0
    for batch in loader:
        count += len(batch["label"])
    return count / (time.perf_counter() - began)


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
    loaders = {
        name: shardprep.SegmentLoader(split, batch_size=BATCH, segment_frames=FRAMES)
        for name, split in splits.items()
    }
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for pair in range(pairs + 2):
        # The first of a pair changes, and the first two pairs warm up.
        for name in sorted(loaders, reverse=bool(pair % 2)):
            rates[name].append(epoch_rate(loaders[name]))
    rates = {name: values[2:] for name, values in rates.items()}
    ratios = [a / b for a, b in zip(rates["adopted"], rates["built"], strict=True)]
    medians = {name: statistics.median(values[1:]) for name, values in costs.items()}
    size = sum(path.stat().st_size for path in (work / "tars").iterdir())
    return {
        **asdict(machine()),
        "utterances": utterances,
        "tar_bytes": size,
        "batch_size": BATCH,
        "segment_frames": FRAMES,
        "pairs": pairs,
        "segments_per_s": {name: round(statistics.median(v)) for name, v in rates.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratio_quartiles": [round(q, 3) for q in statistics.quantiles(ratios, n=4)],
        "adopt_s": round(medians["adopt"], 3),
        "sha256_s": round(medians["sha256"], 3),
        "adopt_relative_to_sha256": round(medians["adopt"] / medians["sha256"], 2),
    }


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
