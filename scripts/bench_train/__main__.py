"""Segments a second of every way to train the boss model on the same data, measured in one run.

    python -m scripts.bench_train [--dataset Dataset/] [--batch N]... [--precision no|bf16]...
        [--out scripts/results/train.json]

- homework, files: the homework's training loop, loader and .pt files. The model comes from the
  `conformer` package, with the axes in the right order, in float32. Measured with 0 and 2 workers.
- homework, shards: the same loop and model, but the batches come from `SegmentLoader`.
- ours: the trainer as it is, with its metrics and its log.
- ours, one batch: the trainer, but it gets the same batch again and again. Nothing is loaded, so
  this is the upper limit.

Each way trains on the same number of segments of 128 frames. In each round, every way is measured
once, in a process of its own. The first third of the steps is warm-up and does not count. The table
shows medians over the rounds.

The share of the peak is the number of arithmetic operations a second (counted, not timed), divided
by what a large matrix product reaches on the same device with the same precision and threads. On a
machine with a GPU the command measures the GPU. Without --dataset, `scripts.synthetic` makes one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import torch

import shardprep
from scripts.bench_train.arithmetic import COUNTED, DTYPES, worthwhile_precisions
from scripts.bench_train.measurement import FRAMES, MEASURED, WARM, Spec
from scripts.bench_train.summary import ratios, summarise, table
from shardprep.bench.machine import machine
from shardprep.system import usable_cores

WORKERS = (0, 2)
SPEAKERS = 100
# Segments in the measured part of a measurement.
CPU_SEGMENTS, GPU_SEGMENTS = 1024, 131_072
LONGEST_SECONDS = 3600.0


def contenders(base: Spec, precisions: Sequence[str], compiled: Sequence[str]) -> dict[str, Spec]:
    """The ways to train that are measured, by name."""
    found = {
        f"homework, files, {workers} workers": replace(base, kind="homework files", workers=workers)
        for workers in WORKERS
    }
    found["homework, shards"] = replace(base, kind="homework shards")
    for precision in precisions:
        for way in compiled:
            how = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}[precision]
            how += "" if way == "off" else ", compiled"
            own = replace(base, precision=precision, compile=way)
            found[f"ours, {how}"] = replace(own, kind="ours")
            found[f"ours, {how}, one batch"] = replace(own, kind="ours fixed")
    return found


def measure_apart(spec: Spec, threads: int, seconds: float = LONGEST_SECONDS) -> dict[str, Any]:
    """Measure in a process of its own, which may take so many seconds.

    Raises:
        subprocess.TimeoutExpired: It took longer.
        RuntimeError: The process failed; the message ends with the end of its stderr.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "ACCELERATE_MIXED_PRECISION": spec.precision,
        "ACCELERATE_USE_CPU": str(spec.cpu).lower(),
    }
    done = subprocess.run(
        [sys.executable, "-m", "scripts.bench_train.measurement", json.dumps(asdict(spec))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    if done.returncode:
        last = " ".join(done.stderr.strip().splitlines()[-3:])
        raise RuntimeError(f"exit code {done.returncode}: {last[-400:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])["found"]
    return found


def measure_batch(
    ways: dict[str, Spec], rounds: int, threads: int, failed: dict[str, str]
) -> dict[str, list[dict[str, Any]]]:
    """Measure all ways, round by round; a way that fails is left out of later rounds."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, spec in ways.items():
            if name not in found:
                continue
            try:
                found[name].append(measure_apart(spec, threads))
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                failed[f"batch {spec.batch}: {name}"] = str(error)
                del found[name]
                click.echo(f"batch {spec.batch}: {name}: failed: {error}", err=True)
            else:
                rate = found[name][-1]["samples_per_s"]
                click.echo(f"batch {spec.batch}: {name}: {rate:,.1f}/s", err=True)
    return found


def prepare(dataset: Path | None, work: Path, utterances: int) -> tuple[Path, Path]:
    """The data set, synthesised if none is given, and its shards, with all data in one split."""
    if dataset is None:
        root = work / "synthetic"
        if not (root / "Dataset" / "metadata.json").exists():
            shutil.rmtree(root, ignore_errors=True)
            each = max(1, utterances // SPEAKERS)
            sizes = ["--speakers", str(SPEAKERS), "--utterances", str(each)]
            subprocess.run(
                [sys.executable, "-m", "scripts.synthetic", str(root), *sizes], check=True
            )
        dataset = root
    if not (dataset / "metadata.json").exists():
        dataset = dataset / "Dataset"
    options = shardprep.BuildOptions(val_fraction=0.0, overwrite=True)
    shardprep.build_shards(dataset, work / "shards", options)
    return dataset.absolute(), work / "shards"


def measure_all(
    base: Spec,
    batches: Sequence[int],
    precisions: Sequence[str],
    compiled: Sequence[str],
    *,
    rounds: int,
    segments: int,
    threads: int,
    whole_frames: int,
) -> dict[str, Any]:
    """All of the result except the description of the machine."""
    failed: dict[str, str] = {}
    peaks = {
        precision: measure_apart(replace(base, kind="peak", precision=precision), threads)
        for precision in dict.fromkeys(("no", *precisions))
    }
    flops = measure_apart(replace(base, kind="flops"), threads)["flops_per_sample"]
    found = []
    for batch in batches:
        block_steps = max(1, segments // (MEASURED * batch))
        ways = contenders(replace(base, batch=batch, block_steps=block_steps), precisions, compiled)
        rows = summarise(measure_batch(ways, rounds, threads, failed), ways, flops, peaks)
        steps = {"warm_steps": WARM * block_steps, "measured_steps": MEASURED * block_steps}
        found.append({"batch": batch, **steps, "ways": rows, "ratios": ratios(rows)})
    whole = None
    if whole_frames:
        spec = replace(base, kind="whole", cpu=True, frames=whole_frames)
        whole = measure_apart(spec, threads)
    arithmetic = {"flops_per_sample": flops, "counted": COUNTED, "peak": peaks}
    return {"batches": found, "arithmetic": arithmetic, "whole": whole, "failed": failed}


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
_NEW = click.Path(path_type=Path, dir_okay=False)
_COUNT = click.IntRange(min=1)


@click.command(context_settings={"show_default": True})
@click.option("--dataset", type=_FOLDER, help="Data to train on.")
@click.option(
    "--utterances", type=_COUNT, default=4000, help="Files to synthesise without --dataset."
)
@click.option(
    "--batch", "batches", multiple=True, type=_COUNT, default=(32,), help="Segments a step."
)
@click.option("--width", type=_COUNT, default=512)
@click.option("--heads", type=_COUNT, default=8)
@click.option(
    "--precision",
    multiple=True,
    type=click.Choice(list(DTYPES)),
    help="[default: both; no alone on a CPU that is slow in bfloat16]",
)
@click.option(
    "--compile/--no-compile",
    "with_compiled",
    default=None,
    help="Measure compiled steps too.  [default: on a GPU]",
)
@click.option("--segments", type=_COUNT, help="Segments to measure.  [default: by the device]")
@click.option("--rounds", type=_COUNT, default=3)
@click.option("--threads", type=_COUNT, default=usable_cores, show_default="the cores")
@click.option(
    "--whole-frames",
    type=click.IntRange(0),
    default=7193,
    help="Length of an utterance to measure the memory of; 0: do not.",
)
@click.option("--cpu", is_flag=True, help="Do not use a GPU.")
@click.option("--work", type=click.Path(path_type=Path), help="Keep the data here.")
@click.option("--out", type=_NEW, help="Result file to write (JSON).")
def main(
    dataset: Path | None,
    utterances: int,
    batches: tuple[int, ...],
    width: int,
    heads: int,
    precision: tuple[str, ...],
    with_compiled: bool | None,
    segments: int | None,
    rounds: int,
    threads: int,
    whole_frames: int,
    cpu: bool,
    work: Path | None,
    out: Path | None,
) -> None:
    """Measure all ways to train the boss recipe, and print tables."""
    on_gpu = torch.cuda.is_available() and not cpu
    with_compiled = on_gpu if with_compiled is None else with_compiled
    compiled = ("off", "default") if with_compiled else ("off",)
    precision = precision or worthwhile_precisions(on_gpu=on_gpu)
    segments = segments or (GPU_SEGMENTS if on_gpu else CPU_SEGMENTS)
    with work_folder(work) as folder:
        given, shards = prepare(dataset, folder, utterances)
        number = len(shardprep.open_shards(shards)["train"])
        if max(batches) > number:
            raise click.UsageError(f"--batch {max(batches)} exceeds the {number} utterances")
        sizes = {"dim": width, "heads": heads, "head_dim": width // heads}
        base = Spec("ours", str(given), str(shards), **sizes, cpu=not on_gpu)  # type: ignore[arg-type]
        found = measure_all(
            base,
            batches,
            precision,
            compiled,
            rounds=rounds,
            segments=segments,
            threads=threads,
            whole_frames=whole_frames,
        )
    about = machine()
    result = {
        **asdict(about),
        "device": torch.cuda.get_device_name() if on_gpu else about.cpu,
        "threads": threads,
        "dataset": {
            "kind": "synthesised" if dataset is None else "given folder",
            "utterances": number,
        },
        "model": {**sizes, "ff_dim": 4 * width, "frames": FRAMES},
        "rounds": rounds,
        "segments": segments,
        **found,
    }
    click.echo(table(result))
    for name, reason in result["failed"].items():
        click.echo(f"failed: {name}: {reason}", err=True)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
