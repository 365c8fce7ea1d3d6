"""Size and speed of shards with `--codec zstd`, by chunk length and compression level.

    python -m scripts.bench.codec Dataset/ [--utterances 2000] [--out scripts/results/codec.json]
    python -m scripts.bench.codec Dataset/ --types [--utterances 70000] [--out ...]

The same utterances are packed once for each setting, and once without compression. In each round
every set is read once, in batches of 256 random segments of 128 frames. A byte shuffle (all low
bytes of a chunk, then all high bytes) is measured too, with code of this file: shardprep does not
offer it, because other readers would find no npy file in such a member.

With --types, the sizes of the shards are compared instead, headers and all, for every element type
and codec. They hardly depend on the values, and not at all with codec none.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import click
import msgspec
import numpy as np
import torch
import zstandard
from tqdm import tqdm

import shardprep
from shardprep.bench.machine import machine
from shardprep.build import writer
from shardprep.format import codecs
from shardprep.source import dataset as source

CHUNKS, LEVELS = (16, 32, 64, 128, 256), (1, 3, 9, 19)
DEFAULT = (64, 3)
TYPES = [(dtype, codec) for dtype in ("float16", "float32", "uint8") for codec in ("none", "zstd")]
BATCH, FRAMES, N_MELS = 256, 128, 40


def settings() -> Iterator[tuple[int, int]]:
    """Every chunk length with the default level, and every level with the default length."""
    yield from ((chunk, DEFAULT[1]) for chunk in CHUNKS)
    yield from ((DEFAULT[0], level) for level in LEVELS if level != DEFAULT[1])


def build(dataset: Path, target: Path, utterances: int, chunk: int | None, level: int) -> int:
    """Pack the first utterances, and return the bytes of the mel members."""
    scanned = source.scan_dataset(dataset)
    some = dataclasses.replace(scanned, labelled=scanned.labelled[:utterances], test=())
    if chunk is None:
        options = shardprep.BuildOptions(val_fraction=0.0, workers=1)
    else:
        options = shardprep.BuildOptions(codec="zstd", level=level, val_fraction=0.0, workers=1)
    with (
        mock.patch.object(writer, "scan_source", return_value=some),
        mock.patch("shardprep.build.options.CHUNK_FRAMES", chunk),
    ):
        shardprep.build_shards(dataset, target, options)
    return int(shardprep.open_shards(target)["train"].locations["nbytes"].sum(dtype=np.int64))


def sizes_of_types(dataset: Path, target: Path, utterances: int) -> list[dict[str, Any]]:
    """Bytes of the shards of the first utterances by element type and codec."""
    scanned = source.scan_dataset(dataset)
    some = dataclasses.replace(scanned, labelled=scanned.labelled[:utterances], test=())
    rows: list[dict[str, Any]] = []
    for dtype, codec in tqdm(TYPES, desc="building", unit="set"):
        options = shardprep.BuildOptions(dtype=dtype, codec=codec, val_fraction=0.0)  # type: ignore[arg-type]
        with mock.patch.object(writer, "scan_source", return_value=some):
            report = shardprep.build_shards(dataset, target, options)
        nbytes = sum(split.bytes for split in report.splits.values())
        rows.append({"dtype": dtype, "codec": codec, "bytes": nbytes})
        shutil.rmtree(target)
    for row in rows:
        row["to_float16"] = round(row["bytes"] / rows[0]["bytes"], 4)
    return rows


def read(target: Path) -> Callable[[], int]:
    """A function that reads one batch and returns its number of segments."""
    split = shardprep.open_shards(target)["train"]
    loader = shardprep.SegmentLoader(split, batch_size=BATCH, segment_frames=FRAMES)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    return lambda: len(next(batches)["label"])


def shuffled(target: Path) -> tuple[int, Callable[[], int]]:
    """The size with a byte shuffle, and a function that reads one batch of such chunks."""
    split, chunk = shardprep.open_shards(target)["train"], DEFAULT[0]
    compressor = zstandard.ZstdCompressor(level=DEFAULT[1], write_checksum=True)
    packed: list[bytes] = []
    owner = []
    for index in range(len(split)):
        mel = split.read(index)
        owner.append(len(packed))
        for at in range(0, len(mel), chunk):
            part = mel[at : at + chunk]
            planes = part.view(np.uint8).reshape(-1, part.itemsize).T
            packed.append(compressor.compress(planes.tobytes()))
    sizes = np.array([len(part) for part in packed])
    ends, data = np.cumsum(sizes), np.frombuffer(b"".join(packed), np.uint8)
    rng, full = np.random.default_rng(0), chunk * N_MELS * split.dtype.itemsize
    usable = np.flatnonzero(split.frames >= FRAMES + chunk)
    out = np.empty((BATCH, 3, chunk * N_MELS, split.dtype.itemsize), np.uint8)

    def batch() -> int:
        # A segment is two chunks long, and nearly always overlaps three chunks.
        picked = rng.choice(usable, BATCH)
        first = np.asarray(owner)[picked] + rng.integers(0, split.frames[picked] // chunk - 2)
        which = (first[:, None] + np.arange(3)).ravel()
        inflated = np.full(len(which), full)
        at, nbytes = (ends - sizes)[which], sizes[which]
        parts = codecs.inflate_many(data, at, nbytes, inflated, torch.get_num_threads())
        for row, part in zip(out.reshape(len(which), -1, out.shape[-1]), parts, strict=True):
            row[:] = np.frombuffer(part, np.uint8).reshape(out.shape[-1], -1).T
        return BATCH

    return int(sizes.sum()), batch


def measure_in_rounds(
    readers: dict[str, Callable[[], int]], rounds: int, seconds: float
) -> dict[str, float]:
    """Median segments a second of each reader."""
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for _, (name, batch) in itertools.product(range(rounds), readers.items()):
        batch()
        count, began = 0, time.perf_counter()
        while (passed := time.perf_counter() - began) < seconds:
            count += batch()
        rates[name].append(count / passed)
    return {name: statistics.median(values) for name, values in rates.items()}


@click.command()
@click.argument("dataset", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--utterances", default=2000, show_default=True, help="Utterances to pack.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", default=1.0, show_default=True, help="Length of each measurement.")
@click.option("--types", is_flag=True, help="Compare the sizes of the element types instead.")
@click.option("--out", type=click.Path(path_type=Path), help="Result file to write (JSON).")
def main(
    dataset: Path, utterances: int, rounds: int, seconds: float, types: bool, out: Path | None
) -> None:
    """Measure all settings and print a table."""
    if types:
        with tempfile.TemporaryDirectory(dir=dataset.parent) as folder:
            rows = sizes_of_types(dataset, Path(folder) / "set", utterances)
        click.echo("| type | codec | size |\n|---|---|---|")
        for row in rows:
            click.echo(f"| {row['dtype']} | {row['codec']} | {row['to_float16']:.3f} |")
        write_part(out, {"types": {"utterances": utterances, "rows": rows}})
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        sizes = {"none": build(dataset, work / "none", utterances, None, 0)}
        readers = {"none": read(work / "none")}
        for chunk, level in tqdm(list(settings()), desc="building", unit="set"):
            name = f"zstd, {chunk} frames, level {level}"
            sizes[name] = build(dataset, work / name, utterances, chunk, level)
            readers[name] = read(work / name)
        name = f"byte shuffle, {DEFAULT[0]} frames, level {DEFAULT[1]}"
        sizes[name], readers[name] = shuffled(work / "none")
        rates = measure_in_rounds(readers, rounds, seconds)
    rows = [
        {
            "setting": name,
            "size_to_none": round(sizes[name] / sizes["none"], 4),
            "segments_per_s": round(rates[name]),
        }
        for name in readers
    ]
    click.echo("| setting | size | segments/s |\n|---|---|---|")
    for row in rows:
        click.echo(f"| {row['setting']} | {row['size_to_none']:.3f} | {row['segments_per_s']:,} |")
    about = {"machine": msgspec.to_builtins(machine()), "utterances": utterances}
    write_part(out, {**about, "rows": rows})


def write_part(out: Path | None, part: dict[str, Any]) -> None:
    """Write a part of the result file, and keep its other parts."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        kept = json.loads(out.read_text()) if out.exists() else {}
        out.write_text(json.dumps({**kept, **part}, indent=2) + "\n")


if __name__ == "__main__":
    main()
