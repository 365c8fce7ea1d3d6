"""The time that packing a data set takes, beside other ways to copy or pack the same files.

    python -m scripts.bench.build Dataset/ [--work FOLDER] [--out scripts/results/build.json]

Every way runs as a command of its own. Its time includes the flush of its files to the disk
(`sync -f`, for all ways, although `shardprep build` has already flushed each shard):

- `tar cf`, to which the others are compared, and `cp -r`;
- a short script with torch.load and webdataset's TarWriter, in one process;
- `shardprep build`, with each codec, and with 1 and 2 workers.

In each round every way is measured once; its files are removed before the next. "Warm" means that
all files are in the page cache; "cold" (which needs root) that the cache was dropped before. Shards
are float16, half the size of the files; --dtype float32 packs as many bytes as `tar` does.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from shardprep.bench.machine import machine
from shardprep.bench.measure import warm

DROP = Path("/proc/sys/vm/drop_caches")
TAR = "tar cf"

BY_HAND = """
import json, sys
from pathlib import Path
import torch, webdataset
source, target, dtype = Path(sys.argv[1]), sys.argv[2], getattr(torch, sys.argv[3])
metadata = json.loads((source / "metadata.json").read_text())
entries = [(e, n) for n, own in enumerate(metadata["speakers"].values()) for e in own]
if (source / "testdata.json").exists():
    entries += [(e, -1) for e in json.loads((source / "testdata.json").read_text())["utterances"]]
sink = webdataset.ShardWriter(target + "/set-%06d.tar", maxcount=1000, maxsize=1e12, verbose=0)
for entry, label in entries:
    mel = torch.load(source / entry["feature_path"], weights_only=True).to(dtype).numpy()
    key = entry["feature_path"].removesuffix(".pt")
    sink.write({"__key__": key, "mel.npy": mel, "cls": label})
sink.close()
"""


def commands(
    dataset: Path, target: Path, dtype: str, workers: Sequence[int]
) -> dict[str, list[str]]:
    """Every way to pack `dataset` into the folder `target`, as a command."""
    source = str(dataset)
    ways = {
        TAR: ["tar", "cf", str(target / "set.tar"), "-C", str(dataset.parent), dataset.name],
        "cp -r": ["cp", "-r", source, str(target / "copy")],
        "torch.load and webdataset": [sys.executable, "-c", BY_HAND, source, str(target), dtype],
    }
    for codec in ("none", "zstd"):
        for count in workers:
            name = f"shardprep build, {codec}, {count} worker{'s' * (count > 1)}"
            options = ["--codec", codec, "--dtype", dtype, "--workers", str(count), "--json"]
            build = [sys.executable, "-m", "shardprep", "build", source, str(target / "shards")]
            ways[name] = [*build, *options]
    return ways


def measure(command: Sequence[str], target: Path) -> tuple[float, int]:
    """The seconds of a command with the flush of its files, and the bytes that it wrote."""
    target.mkdir()
    try:
        began = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        subprocess.run(["sync", "-f", target], check=True)
        seconds = time.perf_counter() - began
        if done.returncode:
            raise click.ClickException(f"{command[:4]} failed: {done.stderr.decode()[-500:]}")
        return seconds, sum(p.stat().st_size for p in target.rglob("*") if p.is_file())
    finally:
        shutil.rmtree(target)


def prepare(files: Sequence[Path], cache: str) -> None:
    """Fill or drop the page cache before a measurement."""
    # Finish all earlier writes and removals, which would slow down the next way.
    os.sync()
    if cache == "cold":
        DROP.write_text("3")
    elif not warm(files):
        raise click.ClickException("the files do not fit into the free memory; measure --cold only")


def measure_in_rounds(
    ways: dict[str, list[str]],
    files: Sequence[Path],
    target: Path,
    caches: Sequence[str],
    rounds: int,
) -> dict[str, dict[str, Any]]:
    """The seconds of every way in every round and state of the cache, and its bytes."""
    results: dict[str, dict[str, Any]] = {name: {cache: [] for cache in caches} for name in ways}
    for number in range(rounds):
        for cache in caches:
            for name, command in ways.items():
                prepare(files, cache)
                seconds, results[name]["bytes"] = measure(command, target)
                results[name][cache].append(seconds)
                click.echo(f"round {number + 1}, {cache}: {name}: {seconds:.1f} s", err=True)
    return results


def summarise(results: dict[str, dict[str, Any]], caches: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each way: its bytes, and the seconds for each state of the cache."""
    rows = []
    for name, found in results.items():
        row: dict[str, Any] = {"way": name, "bytes": found["bytes"]}
        for cache in caches:
            median, tar = (statistics.median(r[cache]) for r in (found, results[TAR]))
            row[cache] = {
                "seconds": round(median, 2),
                "rounds": [round(seconds, 2) for seconds in found[cache]],
                "to_tar": round(median / tar, 3),
            }
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]], caches: Sequence[str]) -> str:
    """The rows as a Markdown table."""
    lines = ["| way | GB | " + " | ".join(f"{cache}, s | to tar" for cache in caches) + " |"]
    lines.append("|---" * (2 + 2 * len(caches)) + "|")
    for row in rows:
        cells = [row["way"], f"{row['bytes'] / 1e9:.2f}"]
        for cache in caches:
            cells += [f"{row[cache]['seconds']:.1f}", f"{row[cache]['to_tar']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


@click.command()
@click.argument("dataset", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--work",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder to write into; by default the parent of DATASET, so on the same disk.",
)
@click.option("--rounds", default=3, show_default=True)
@click.option("--dtype", type=click.Choice(["float16", "float32"]), default="float16")
@click.option("--workers", multiple=True, type=click.IntRange(min=1), default=(1, 2))
@click.option(
    "--only", multiple=True, help="Part of the name of a way to measure; tar is always measured."
)
@click.option("--cold/--no-cold", default=None, help="Default: if the cache can be dropped.")
@click.option("--warm/--no-warm", "hot", default=True, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Result file to write (JSON).")
def main(
    dataset: Path,
    work: Path | None,
    rounds: int,
    dtype: str,
    workers: tuple[int, ...],
    only: tuple[str, ...],
    cold: bool | None,
    hot: bool,
    out: Path | None,
) -> None:
    """Measure all ways to pack DATASET and print a table."""
    # The temporary folder is large. It is removed only if the process ends by an exception.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    dataset = dataset.resolve()
    files = sorted(path for path in dataset.rglob("*") if path.is_file())
    cold = os.access(DROP, os.W_OK) if cold is None else cold
    caches = [name for name, chosen in (("warm", hot), ("cold", cold)) if chosen]
    with tempfile.TemporaryDirectory(prefix="bench-build-", dir=work or dataset.parent) as folder:
        target = Path(folder) / "out"
        ways = commands(dataset, target, dtype, workers)
        if only:
            kept = [name for name in ways if name == TAR or any(part in name for part in only)]
            ways = {name: ways[name] for name in kept}
        rows = summarise(measure_in_rounds(ways, files, target, caches, rounds), caches)
    click.echo(table(rows, caches))
    if out is not None:
        result = {
            "machine": msgspec.to_builtins(machine()),
            "dataset": {"files": len(files), "bytes": sum(path.stat().st_size for path in files)},
            "dtype": dtype,
            "ways": rows,
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
