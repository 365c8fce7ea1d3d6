"""Segments per second of every way to read the same data set, measured in one run.

    python -m scripts.bench.loader [--dataset Dataset/ | --lengths FILE] [--work FOLDER]
        [--out scripts/results/loader.json] [--plot scripts/results/loader.png]

All loaders read the same utterances, which are in the page cache. They give batches of 256 random
float16 segments of 128 frames, in shuffled order; short utterances are padded with -20. Loaders
with worker processes are measured with 0 and with 2 workers:

- one .pt file for each utterance, with the homework's own Dataset and DataLoader;
- the libraries of `peers.py`, each from its own format;
- `shardprep.SegmentLoader` in one process, for shards of both codecs;
- the limit: copying as many bytes from random positions of an array in memory.

Without --dataset, `scripts.synthetic` makes a data set. Its lengths come from a file, or from a
log-normal distribution that fits the homework. In each round every loader is measured once, in a
process of its own; the table shows medians over the rounds. A library that is not installed is
skipped. A library that fails is named with its error, and the others are still measured. The
converted data take about nine times the space of the shards. With --work they are kept, and the
next run uses them again.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np

import shardprep
from scripts.bench.peers import NOT_ADVISED, PEERS, Peer
from shardprep.bench.loaders import SegmentShape, file_candidate, shard_candidate
from shardprep.bench.machine import machine
from shardprep.bench.measure import Candidate, Rate, in_own_process, measure_in_rounds
from shardprep.bench.memory_limit import limit_candidates, limit_rows
from shardprep.bench.results import LoaderResult, best_limit, summarise
from shardprep.source.dataset import scan_dataset

BATCH, FRAMES = 256, 128
MEDIAN_LENGTH, SPREAD, SHORTEST, LONGEST = 540, 0.5, 91, 7193
SPEAKERS = 60
WORKERS = (0, 2)
PACKAGES = ("files", *dict.fromkeys(peer.package for peer in PEERS))
CONVERT_SECONDS = 3600.0


def synthesise(work: Path, utterances: int, lengths: Path | None) -> Path:
    """A data set of synthetic speech in the work folder, made there unless it exists."""
    if lengths is None:
        drawn = np.exp(np.random.default_rng(0).normal(np.log(MEDIAN_LENGTH), SPREAD, utterances))
        lengths = work / "lengths.txt"
        rows = drawn.clip(SHORTEST, LONGEST).astype(int)
        lengths.write_text("".join(f"{length}\n" for length in rows))
    root = work / "synthetic"
    if not (root / "Dataset" / "metadata.json").exists():
        shutil.rmtree(root, ignore_errors=True)
        options = ["--speakers", str(SPEAKERS), "--lengths", str(lengths)]
        subprocess.run([sys.executable, "-m", "scripts.synthetic", str(root), *options], check=True)
    return root / "Dataset"


def convert(peer: Peer, shards: Path, work: Path, fingerprint: str) -> tuple[Path, float]:
    """The split in a peer's format, and the seconds that its conversion took."""
    folder, marker = work / peer.format, work / f"{peer.format}.json"
    made = json.loads(marker.read_text()) if marker.exists() else {}
    if made.get("fingerprint") != fingerprint:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        began = time.perf_counter()
        quietly = partial(_quietly, work / f"{peer.format}.log", peer.convert, shards, folder)
        in_own_process(quietly, CONVERT_SECONDS)
        made = {"fingerprint": fingerprint, "seconds": round(time.perf_counter() - began, 1)}
        marker.write_text(json.dumps(made))
    return folder, made["seconds"]


def _quietly(log: Path, call: Any, *arguments: Any) -> Any:
    """Call with stdout and stderr going to a file, for the rest of this process."""
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    return call(*arguments)


def build(dataset: Path, work: Path) -> tuple[dict[str, Path], dict[str, float]]:
    """Shards of both codecs, all labelled utterances in one split, and the seconds they took."""
    folders, seconds = {}, {}
    for codec in ("none", "zstd"):
        folders[f"shardprep {codec}"] = work / f"shards-{codec}"
        # Existing shards are kept if they were built from the same data.
        options = shardprep.BuildOptions(codec=codec, val_fraction=0.0, overwrite=True)
        report = shardprep.build_shards(dataset, work / f"shards-{codec}", options)
        seconds[f"shardprep {codec}"] = round(report.seconds, 1)
    return folders, seconds


def peer_candidates(
    shards: Path, work: Path, shape: SegmentShape, only: Sequence[str], result: dict[str, Any]
) -> Iterator[Candidate]:
    """The loaders of all peers that are asked for and installed; `result` names the others."""
    fingerprint = shardprep.open_shards(shards).manifest.fingerprint
    for peer in PEERS:
        if only and peer.package not in only:
            result["skipped"][peer.name] = "not asked for"
        elif not peer.installed:
            result["skipped"][peer.name] = "not installed"
        else:
            click.echo(f"converting for {peer.name}", err=True)
            try:
                folder, seconds = convert(peer, shards, work, fingerprint)
            except Exception as error:
                result["failed"][peer.name] = f"converting: {type(error).__name__}: {error}"
                continue
            result["conversion_s"][peer.name] = seconds
            result["versions"][peer.package] = version(peer.package)
            log = work / f"{peer.format}.log"
            for candidate in peer.candidates(folder, shape):
                yield Candidate(
                    candidate.name,
                    candidate.kind,
                    partial(_quietly, log, candidate.start),
                    candidate.files,
                    candidate.workers,
                )


def measure_all(
    dataset: Path, work: Path, only: Sequence[str], rounds: int, seconds: float
) -> dict[str, Any]:
    """Convert the data set for all loaders, measure them, and return the result file."""
    folders, conversion = in_own_process(partial(build, dataset, work), CONVERT_SECONDS)
    plain = shardprep.open_shards(folders["shardprep none"])
    split = plain["train"]
    shape = SegmentShape(min(BATCH, len(split)), FRAMES, split.n_mels, split.dtype)
    about = machine()
    result: dict[str, Any] = {
        **asdict(about),
        "dataset": {"utterances": len(split), "frames": int(split.frames.sum())},
        "batch": [shape.batch_size, shape.frames, shape.n_mels],
        "dtype": str(shape.dtype),
        "rounds": rounds,
        "seconds": seconds,
        "conversion_s": conversion,
        "skipped": {},
        "failed": {},
    }
    candidates = []
    if not only or "files" in only:
        by_key = scan_dataset(dataset).by_key
        files = [
            (dataset / by_key[str(key)].path, int(label))
            for key, label in zip(split.keys, split.labels, strict=True)
        ]
        candidates += [file_candidate(files, shape, workers) for workers in WORKERS]
    candidates += peer_candidates(plain.path, work, shape, only, result)
    for name, folder in folders.items():
        candidates.append(shard_candidate(name, shardprep.open_shards(folder), "train", shape))
    # Write everything to the disk now, not while a loader is measured.
    os.sync()
    rows = limit_rows(result["dataset"]["frames"] * split.n_mels * split.dtype.itemsize, shape)
    limits = limit_candidates(rows, shape)
    measured = measure_in_rounds(
        [*candidates, *limits],
        rounds=rounds,
        seconds=seconds,
        on_measurement=_tell,
        keep_going=True,
    )
    result["failed"].update(measured.failures)
    limit = best_limit(measured, limits, rows * shape.nbytes)
    loaders = summarise(measured, [*candidates, *limits], limit, shape.nbytes)
    result["limit"] = asdict(limit)
    result["loaders"] = [asdict(loader) for loader in loaders]
    result["ratios"] = ratios(loaders)
    return result


def ratios(loaders: Sequence[LoaderResult]) -> dict[str, Any]:
    """Our speed relative to others; None if one of the two was not measured."""
    rates = {loader.name: loader.samples_per_s for loader in loaders}
    ours = rates.get("shardprep none, one process")
    packed = rates.get("shardprep zstd, one process")
    own = ("files", "shardprep", "limit")
    peers = {loader.name: loader.samples_per_s for loader in loaders if loader.kind not in own}
    advised = {name: rate for name, rate in peers.items() if not name.startswith(NOT_ADVISED)}
    files = [loader.samples_per_s for loader in loaders if loader.kind == "files"]
    zst = [rate for name, rate in rates.items() if name.startswith("webdataset .npy.zst")]
    limit = [loader.samples_per_s for loader in loaders if loader.kind == "limit"]
    return {
        "ours_to_files": _ratio(ours, files),
        "ours_to_best_peer": _ratio(ours, peers.values()),
        "best_peer": max(peers, key=lambda name: peers[name], default=None),
        "ours_to_best_advised_peer": _ratio(ours, advised.values()),
        "best_advised_peer": max(advised, key=lambda name: advised[name], default=None),
        "ours_to_limit": _ratio(ours, limit),
        "zstd_to_webdataset_zst": _ratio(packed, zst),
    }


def _ratio(rate: float | None, others: Any) -> float | None:
    best = max(others, default=None)
    return None if rate is None or best is None else round(rate / best, 3)


def _tell(name: str, rate: Rate | None) -> None:
    click.echo(f"{name}: {'failed' if rate is None else f'{rate.samples_per_s:,.0f}/s'}", err=True)


def print_result(result: dict[str, Any]) -> None:
    """Print the table as Markdown, and what is missing from it."""
    click.echo("| loader | samples/s | to the files | to the limit |\n|---|---|---|---|")
    for row in result["loaders"]:
        to_files = "-" if row["to_files"] is None else f"{row['to_files']:.1f}x"
        click.echo(
            f"| {row['name']} | {row['samples_per_s']:,.0f} | {to_files} | {row['to_limit']:.3f} |"
        )
    for name, value in result["ratios"].items():
        click.echo(f"{name}: {value}")
    for kind in ("skipped", "failed"):
        for name, reason in result[kind].items():
            click.echo(f"{kind}: {name}: {reason}", err=True)


@contextmanager
def work_folder(kept: Path | None) -> Iterator[Path]:
    """The given folder, or a temporary one."""
    if kept is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    else:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept.absolute()


_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_NEW = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.option("--dataset", type=_FOLDER, help="Data to read.")
@click.option(
    "--utterances", default=6000, show_default=True, help="Files to make without --dataset."
)
@click.option("--lengths", type=_FILE, help="File with the lengths of these files.")
@click.option(
    "--only", multiple=True, type=click.Choice(PACKAGES), help="Measure only these and ours."
)
@click.option("--rounds", default=3, show_default=True)
@click.option("--seconds", default=3.0, show_default=True, help="Length of each measurement.")
@click.option("--work", type=click.Path(path_type=Path), help="Keep the converted data here.")
@click.option("--out", type=_NEW, help="Result file to write (JSON).")
@click.option("--plot", type=_NEW, help="Picture of the result to write (PNG); needs matplotlib.")
def main(
    dataset: Path | None,
    utterances: int,
    lengths: Path | None,
    only: tuple[str, ...],
    rounds: int,
    seconds: float,
    work: Path | None,
    out: Path | None,
    plot: Path | None,
) -> None:
    """Measure all loaders and print a table."""
    # Some peers look for news on the network; nothing here needs it.
    os.environ.update(
        HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", LITDATA_DISABLE_VERSION_CHECK="1"
    )
    with work_folder(work) as folder:
        kind = "given folder" if dataset is not None else "synthesised"
        dataset = dataset or synthesise(folder, utterances, lengths)
        result = measure_all(dataset, folder, only, rounds, seconds)
    result["dataset"]["kind"] = kind
    print_result(result)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")
    if plot is not None:
        from scripts.bench.loader_plot import draw

        draw(result, plot)


if __name__ == "__main__":
    main()
