"""Size and speed of shards with `--codec zstd`, and how near it comes to the bare inflating.

    python -m scripts.bench.codec Dataset/ [--utterances 2000] [--out scripts/results/codec.json]
    python -m scripts.bench.codec Dataset/ --types [--utterances 70000] [--out ...]

The same utterances are packed once for each setting: chunk lengths, levels, element types, and
without compression. All settings take turns, of eight batches of 256 random segments, and the
medians over the turns are compared. So other programs on the machine slow all of them alike.

What the chunks of the very same batches take by themselves is measured in the same turns, by both
cores: inflated by one call of the library with two threads, and by two threads with a call for each
piece of 1 MiB, which needs less new memory. "To bare" is the faster of them, divided by ours.
Besides the time that passes, the time of the processors is measured, of all threads together: on a
busy machine it tells more.

A byte shuffle (all low bytes of a chunk, then all high bytes) is measured too, with code of this
file: shardprep does not offer it, because other readers would find no npy file in such a member.

With --types, the sizes of the shards are compared instead, headers and all, for every element type
and codec. They hardly depend on the values, and not at all with codec none.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import click
import msgspec
import numpy as np
import zstandard
from numpy.typing import NDArray
from tqdm import tqdm

import shardprep
from shardprep.bench.machine import machine
from shardprep.build import writer
from shardprep.build.options import CHUNK_FRAMES, DEFAULT_ZSTD_LEVEL
from shardprep.format import codecs
from shardprep.read.gather import zstd
from shardprep.source import dataset as source
from shardprep.system import usable_cores

CHUNKS, LEVELS = (16, 32, 48, 64, 96, 128, 256), (1, 9, 19)
TYPES = [(dtype, codec) for dtype in ("float16", "float32", "uint8") for codec in ("none", "zstd")]
BATCH, FRAMES, BATCHES = 256, 128, 8
OTHER_FRAMES = (64, 300)
PIECE = 1 << 20
PAUSE = 0.01

Batch = tuple[NDArray[np.int64], NDArray[np.int64]]
Frames = tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
Turn = list[Callable[[], object]]


class Setting(NamedTuple):
    """How a set is packed; `chunk` is None without compression."""

    dtype: str
    chunk: int | None
    level: int = DEFAULT_ZSTD_LEVEL

    @property
    def name(self) -> str:
        """What the table calls it."""
        packed = "none" if self.chunk is None else f"zstd, {self.chunk} frames, level {self.level}"
        return f"{self.dtype}, {packed}"


def settings() -> Iterator[Setting]:
    """Every chunk length, every level with the default length, and the other element types."""
    yield Setting("float16", None)
    yield from (Setting("float16", chunk) for chunk in CHUNKS)
    yield from (Setting("float16", CHUNK_FRAMES, level) for level in LEVELS)
    for dtype in ("float32", "uint8"):
        yield from (Setting(dtype, None), Setting(dtype, CHUNK_FRAMES))


def build(dataset: Path, target: Path, utterances: int, setting: Setting) -> shardprep.Split:
    """Pack the first utterances."""
    scanned = source.scan_dataset(dataset)
    some = dataclasses.replace(scanned, labelled=scanned.labelled[:utterances], test=())
    options: dict[str, Any] = {"dtype": setting.dtype, "val_fraction": 0.0, "workers": 1}
    if setting.chunk is not None:
        options |= {"codec": "zstd", "level": setting.level}
    with (
        mock.patch.object(writer, "scan_source", return_value=some),
        mock.patch("shardprep.build.options.CHUNK_FRAMES", setting.chunk),
    ):
        shardprep.build_shards(dataset, target, shardprep.BuildOptions(**options))
    return shardprep.open_shards(target)["train"]


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


def stored_bytes(split: shardprep.Split) -> int:
    """Bytes of the mel members."""
    return int(split.locations["nbytes"].sum(dtype=np.int64))


def random_batches(split: shardprep.Split, frames: int) -> list[Batch]:
    """Utterances and starts of the segments of some batches; the same for equal splits."""
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(BATCHES):
        indices = rng.integers(0, len(split), BATCH)
        last = np.maximum(split.frames[indices] - frames, 0)
        batches.append((indices, rng.integers(0, last + 1)))
    return batches


def as_stored(split: shardprep.Split, batch: Batch, out: NDArray[Any]) -> NDArray[Any]:
    """The segments of a batch in the element type of the shards."""
    read = split.stored_segments if split.is_quantised else split.segments
    return read(*batch, out.shape[1], out=out)


def segments(split: shardprep.Split, frames: int) -> Turn:
    """Functions that each read a batch."""
    out = np.empty((BATCH, frames, split.n_mels), split.stored_dtype)
    batches = random_batches(split, frames)
    return [functools.partial(as_stored, split, batch, out) for batch in batches]


def needed(split: shardprep.Split, frames: int) -> list[Frames]:
    """The zstd frames that each batch of `segments` inflates."""
    found: list[Frames] = []

    def note(*wanted: Any) -> Any:
        found.append(wanted)
        return inflate(*wanted)

    inflate = codecs.inflate_joined
    with (
        mock.patch.object(codecs, "inflate_joined", note),
        mock.patch.object(zstd, "threads", return_value=1),
        mock.patch.object(zstd, "_LEAST_HELD", 1 << 40),
        mock.patch.object(zstd, "_MOST_HELD", 1 << 40),
    ):
        for read in segments(split, frames):
            read()
    assert len(found) == BATCHES
    return found


def bare_calls(wanted: Sequence[Frames]) -> Turn:
    """Functions that each inflate what a batch needs, by one call with as many threads as cores."""
    return [functools.partial(codecs.inflate_many, *own, usable_cores()) for own in wanted]


def bare_pieces(wanted: Sequence[Frames], pool: ThreadPoolExecutor) -> Turn:
    """Functions that each inflate what a batch needs, in pieces that the threads of a pool take."""

    def cut(source: Any, at: Any, nbytes: Any, inflated: Any) -> list[Frames]:
        held = np.cumsum(inflated)
        count = -(-int(held[-1]) // PIECE)
        ends = np.searchsorted(held, held[-1] * np.arange(1, count) // count)
        parts = (np.split(values, ends) for values in (at, nbytes, inflated))
        return [(source, *part) for part in zip(*parts, strict=True)]

    def inflate(pieces: list[Frames]) -> None:
        for done in [pool.submit(codecs.inflate_many, *piece) for piece in pieces]:
            done.result()

    return [functools.partial(inflate, cut(*own)) for own in wanted]


def shuffled(split: shardprep.Split) -> tuple[int, Turn]:
    """The size with a byte shuffle, and functions that read batches of such chunks."""
    chunk, width = CHUNK_FRAMES, split.n_mels
    compressor = zstandard.ZstdCompressor(level=DEFAULT_ZSTD_LEVEL, write_checksum=True)
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
    rng, full = np.random.default_rng(0), chunk * width * split.dtype.itemsize
    usable = np.flatnonzero(split.frames >= FRAMES + chunk)
    out = np.empty((BATCH, 3, chunk * width, split.dtype.itemsize), np.uint8)

    def read() -> None:
        # A segment is two chunks long, and nearly always overlaps three chunks.
        picked = rng.choice(usable, BATCH)
        first = np.asarray(owner)[picked] + rng.integers(0, split.frames[picked] // chunk - 2)
        which = (first[:, None] + np.arange(3)).ravel()
        inflated = np.full(len(which), full)
        at, nbytes = (ends - sizes)[which], sizes[which]
        parts = codecs.inflate_many(data, at, nbytes, inflated, usable_cores())
        for row, part in zip(out.reshape(len(which), -1, out.shape[-1]), parts, strict=True):
            row[:] = np.frombuffer(part, np.uint8).reshape(out.shape[-1], -1).T

    return int(sizes.sum()), [read] * BATCHES


class Seconds(NamedTuple):
    """What a batch takes, the median over the turns."""

    passed: float
    processor: float


def take_turns(contestants: dict[str, Turn], rounds: int) -> dict[str, Seconds]:
    """Measure everything, one after another, `rounds` times."""
    taken: dict[str, list[Seconds]] = {name: [] for name in contestants}
    for number in tqdm(range(rounds + 1), desc="measuring", unit="round"):
        for name, batches in contestants.items():
            # PyTorch's threads, which copy without compression, stay busy for a moment.
            time.sleep(PAUSE)
            batches[0]()
            processor, passed = time.process_time(), time.perf_counter()
            for batch in batches:
                batch()
            passed = time.perf_counter() - passed
            processor = time.process_time() - processor
            # The first round warms up.
            if number:
                taken[name].append(Seconds(passed / BATCHES, processor / BATCHES))
    return {
        name: Seconds(*(statistics.median(values) for values in zip(*rows, strict=True)))
        for name, rows in taken.items()
    }


def measure(dataset: Path, work: Path, utterances: int, rounds: int) -> list[dict[str, Any]]:
    """Build and measure all settings; a row of the result for each."""
    contestants: dict[str, Turn] = {}
    sizes: dict[str, int] = {}
    with ThreadPoolExecutor(usable_cores()) as pool:
        for setting in tqdm(list(settings()), desc="building", unit="set"):
            name = setting.name
            split = build(dataset, work / name, utterances, setting)
            sizes[name] = stored_bytes(split)
            contestants[name] = segments(split, FRAMES)
            if setting.chunk is not None:
                wanted = needed(split, FRAMES)
                contestants[f"{name}, bare calls"] = bare_calls(wanted)
                contestants[f"{name}, bare pieces"] = bare_pieces(wanted, pool)
            if setting.dtype == "float16" and setting.level == DEFAULT_ZSTD_LEVEL:
                for frames in OTHER_FRAMES:
                    contestants[f"{name}, {frames}"] = segments(split, frames)
        plain = shardprep.open_shards(work / Setting("float16", None).name)["train"]
        shuffle = f"float16, byte shuffle, {CHUNK_FRAMES} frames, level {DEFAULT_ZSTD_LEVEL}"
        sizes[shuffle], contestants[shuffle] = shuffled(plain)
        taken = take_turns(contestants, rounds)
    return [row(name, sizes[name] / stored_bytes(plain), taken) for name in sizes]


def row(name: str, size: float, taken: dict[str, Seconds]) -> dict[str, Any]:
    """The result of a setting."""
    own = taken[name]
    found: dict[str, Any] = {
        "setting": name,
        "size_to_none": round(size, 4),
        "segments_per_s": round(BATCH / own.passed),
        "processor_us_per_segment": round(own.processor / BATCH * 1e6, 2),
    }
    for frames in OTHER_FRAMES:
        if other := taken.get(f"{name}, {frames}"):
            found[f"segments_of_{frames}_per_s"] = round(BATCH / other.passed)
            micro = other.processor / BATCH * 1e6
            found[f"processor_us_per_segment_of_{frames}"] = round(micro, 2)
    bare = [taken[key] for kind in ("calls", "pieces") if (key := f"{name}, bare {kind}") in taken]
    if bare:
        passed, processor = (min(values) for values in zip(*bare, strict=True))
        found |= {
            "bare_per_s": round(BATCH / passed),
            "to_bare": round(passed / own.passed, 3),
            "to_bare_by_processor_time": round(processor / own.processor, 3),
            "to_one_call": round(bare[0].passed / own.passed, 3),
        }
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The result as Markdown."""
    lines = [
        "| setting | size | segments/s | µs of processor | to bare | by processor time |",
        "|---|---|---|---|---|---|",
    ]
    for own in rows:
        bare = own.get("to_bare", "-"), own.get("to_bare_by_processor_time", "-")
        lines.append(
            f"| {own['setting']} | {own['size_to_none']:.3f} | {own['segments_per_s']:,} | "
            f"{own['processor_us_per_segment']:.1f} | {bare[0]} | {bare[1]} |"
        )
    return "\n".join(lines)


@click.command()
@click.argument("dataset", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--utterances", default=2000, show_default=True, help="Utterances to pack.")
@click.option("--rounds", default=10, show_default=True, help="Turns of each.")
@click.option("--types", is_flag=True, help="Compare the sizes of the element types instead.")
@click.option("--out", type=click.Path(path_type=Path), help="Result file to write (JSON).")
def main(dataset: Path, utterances: int, rounds: int, types: bool, out: Path | None) -> None:
    """Measure all settings and print a table."""
    if types:
        with tempfile.TemporaryDirectory(dir=dataset.parent) as folder:
            found = sizes_of_types(dataset, Path(folder) / "set", utterances)
        click.echo("| type | codec | size |\n|---|---|---|")
        for own in found:
            click.echo(f"| {own['dtype']} | {own['codec']} | {own['to_float16']:.3f} |")
        write_part(out, {"types": {"utterances": utterances, "rows": found}})
        return
    with tempfile.TemporaryDirectory() as folder:
        found = measure(dataset, Path(folder), utterances, rounds)
    click.echo(table(found))
    about = {
        "machine": msgspec.to_builtins(machine()),
        "utterances": utterances,
        "batch": [BATCH, FRAMES],
        "batches_a_turn": BATCHES,
        "rounds": rounds,
    }
    write_part(out, {**about, "rows": found})


def write_part(out: Path | None, part: dict[str, Any]) -> None:
    """Write a part of the result file, and keep its other parts."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        kept = json.loads(out.read_text()) if out.exists() else {}
        out.write_text(json.dumps({**kept, **part}, indent=2) + "\n")


if __name__ == "__main__":
    main()
