"""Measure training on this machine's GPU, beside what was predicted for it.

    python -m scripts.bench_train.gpu [--minutes 7.5] [--cpu] [--quick]
        [--out scripts/results/gpu.json]

- the homework's loop: the homework's training loop and model in float32, on its files with two
  workers, and on shards.
- boss: the trainer as it is, in 16 bits; eager, compiled and in CUDA graphs, with batches of 32 to
  4,096, with the data on the GPU and on the host.

Each measurement is made in a process of its own, for some seconds after its warm-up. The most
telling come first; those for which the time does not suffice are named. The data are noise, 8,192
utterances with the homework's 40 bins and 600 speakers. Nothing is fetched.

The prediction is that of `scripts.bench_train.predict`. The result tells by what to scale it:
`--calibration` of that command takes it.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import torch

import shardprep
from scripts.bench_train.__main__ import measure_apart
from scripts.bench_train.gpus import GPU, find
from scripts.bench_train.measurement import MEASURED, WARM, Spec
from scripts.synthetic.noise import make_noise
from shardprep.bench.machine import machine
from shardprep.system import usable_cores

PREDICTIONS = Path(__file__).parents[1] / "results" / "predict.json"
UTTERANCES, SPEAKERS = 8192, 600
# Way, batch size and placement of the data; the most telling come first.
ORDER = (
    ("eager", 32, "device"),
    ("graphs", 32, "device"),
    ("compiled", 32, "device"),
    ("eager", 4096, "device"),
    ("compiled", 4096, "device"),
    ("graphs", 32, "host"),
    ("compiled", 4096, "host"),
    ("eager", 512, "device"),
    ("compiled", 512, "device"),
    ("graphs", 512, "device"),
    ("graphs", 4096, "device"),
    ("eager", 128, "device"),
    ("eager", 2048, "device"),
    ("graphs", 128, "device"),
    ("compiled", 2048, "device"),
)
# To try the command on a CPU, which has no CUDA graphs.
TRIAL = (("eager", 4, "device"), ("eager", 8, "host"))
# The homework's loop comes after so many of these.
BEFORE_HOMEWORK = 3
# To start a process, and to compile in it.
START_SECONDS, COMPILE_SECONDS = 20.0, 60.0
# A measurement, warm-up and all, takes about this long where the prediction is right.
STEPS_SECONDS = 5.0
WAYS = {"eager": "off", "compiled": "default", "graphs": "graphs"}


def plan(base: Spec, order: Sequence[tuple[str, int, str]]) -> dict[str, Spec]:
    """The measurements by name, in the order in which they are made."""
    found: dict[str, Spec] = {}
    for number, (way, batch, placement) in enumerate(order):
        where = "" if placement == "device" else ", data on the host"
        found[f"boss, {way}, batch {batch:,}{where}"] = replace(
            base, kind="ours", batch=batch, compile=WAYS[way], placement=placement
        )
        if number == min(BEFORE_HOMEWORK, len(order)) - 1:
            homework = replace(base, precision="no", batch=order[0][1])
            workers = 0 if base.cpu else 2
            files = replace(homework, kind="homework files", workers=workers)
            found["the homework's loop, its files"] = files
            found["the homework's loop, shards"] = replace(homework, kind="homework shards")
    return found


def predictions(path: Path, gpu: GPU | None) -> dict[tuple[str, int], dict[str, Any]]:
    """What was predicted for boss on a GPU, by way and batch size; nothing if it is not known."""
    if gpu is None or not path.exists():
        return {}
    return {
        (row["way"], row["batch"]): row
        for row in json.loads(path.read_text())["gpus"]
        if (row["recipe"], row["gpu"]) == ("boss", gpu.name)
    }


def way_of(spec: Spec) -> str | None:
    """The way of a measurement of boss; None for the homework's loop."""
    names = {value: name for name, value in WAYS.items()}
    return names[spec.compile] if spec.kind == "ours" else None


def block_steps(spec: Spec, predicted: float | None) -> int:
    """Steps of a block, so that all blocks take about `STEPS_SECONDS`."""
    if spec.cpu:
        return 1
    if predicted is None:
        # An unknown GPU; the homework's loop is slower.
        predicted = 20_000.0 if spec.kind == "ours" else 4_000.0
    return max(1, round(STEPS_SECONDS * predicted / spec.batch / (WARM + MEASURED)))


def measure_all(
    specs: dict[str, Spec], expected: dict[tuple[str, int], dict[str, Any]], minutes: float
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Measure what the time allows: rows, and why others are left out."""
    deadline = time.monotonic() + 60 * minutes
    rows, left_out = [], {}
    for name, spec in specs.items():
        way = way_of(spec)
        predicted = expected.get((way or "", spec.batch))
        needed = START_SECONDS + (COMPILE_SECONDS if way in ("compiled", "graphs") else 0.0)
        left = deadline - time.monotonic()
        if left < needed:
            left_out[name] = "no time left"
        elif predicted is not None and not predicted["fits"]:
            left_out[name] = "needs more memory than the GPU has"
        else:
            rate = None if predicted is None else predicted["segments_per_s"]
            spec = replace(spec, block_steps=block_steps(spec, rate))
            try:
                found = measure_apart(spec, usable_cores(), left)
            except subprocess.TimeoutExpired:
                left_out[name] = "took too long"
            except RuntimeError as error:
                left_out[name] = str(error)
            else:
                rows.append(compare(name, spec, found, predicted))
                click.echo(line(rows[-1]), err=True)
        if name in left_out:
            click.echo(f"{name}: {left_out[name]}", err=True)
    return rows, left_out


def compare(
    name: str, spec: Spec, found: dict[str, Any], predicted: dict[str, Any] | None
) -> dict[str, Any]:
    """A measurement beside its prediction."""
    rate = None if predicted is None else predicted["segments_per_s"]
    ratio = rate and rate / found["samples_per_s"]
    return {
        "name": name,
        "way": way_of(spec),
        "batch": spec.batch,
        "placement": spec.placement,
        "segments_per_s": found["samples_per_s"],
        "predicted": rate,
        "ratio": ratio,
        "share_of_peak": predicted and predicted["share_of_peak"] / ratio,
        "waiting": found["waiting"],
        "peak_memory_mib": found["peak_memory_mib"],
    }


def scales(
    rows: Sequence[dict[str, Any]], expected: dict[tuple[str, int], dict[str, Any]]
) -> dict[str, float]:
    """How many times as long as predicted GPU and host took: medians, 1 where nothing tells."""
    taken: dict[str, list[float]] = {"device": [], "host": []}
    for row in rows:
        predicted = expected.get((row["way"], row["batch"]))
        if predicted is None or row["placement"] != "device":
            continue
        slower = "device" if predicted["device_s"] >= predicted["host_s"] else "host"
        seconds = row["batch"] / row["segments_per_s"]
        taken[slower].append(seconds / predicted[f"{slower}_s"])
    return {name: statistics.median(found) if found else 1.0 for name, found in taken.items()}


def write_lists(data: Path) -> None:
    """Write the two lists besides metadata.json that the homework's loop reads."""
    metadata = json.loads((data / "metadata.json").read_text())
    numbers = {name: number for number, name in enumerate(metadata["speakers"])}
    mapping = {
        "speaker2id": numbers,
        "id2speaker": {str(number): name for name, number in numbers.items()},
    }
    (data / "mapping.json").write_text(json.dumps(mapping))
    test = {"n_mels": metadata["n_mels"], "utterances": []}
    (data / "testdata.json").write_text(json.dumps(test))


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    if row["predicted"] is None:
        beside = "- | - | -"
    else:
        beside = f"{row['share_of_peak']:.1%} | {row['predicted']:,.0f} | {row['ratio']:.2f}"
    return (
        f"| {row['name']} | {row['segments_per_s']:,.0f} | {beside} | {row['waiting']:.1%} | "
        f"{row['peak_memory_mib']:,.0f} |"
    )


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    head = "| what | segments/s | of the peak | predicted | ratio | waiting | MiB |"
    lines = [f"{result['device']}, {result['date']}:", "", head, "|---|---|---|---|---|---|---|"]
    lines += [line(row) for row in result["rows"]]
    lines += ["", *(f"- left out: {name}: {why}" for name, why in result["left_out"].items())]
    return "\n".join(lines)


def half_precision(gpu: GPU | None, *, cpu: bool) -> str:
    """The precision in which boss is measured: 16 bits that the GPU multiplies."""
    if cpu:
        return "no"
    return "bf16" if gpu is None or gpu.bfloat16 else "fp16"


@click.command(context_settings={"show_default": True})
@click.option("--minutes", type=click.FloatRange(min=0), default=7.5, help="Time for all.")
@click.option("--cpu", is_flag=True, help="Measure the CPU, to try this command.")
@click.option("--quick", is_flag=True, help="Small models and data, to try this command.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Result file (JSON).")
def main(minutes: float, cpu: bool, quick: bool, out: Path | None) -> None:
    """Measure training on a GPU, and print it beside the prediction."""
    began = time.monotonic()
    if not cpu and not torch.cuda.is_available():
        raise click.UsageError("PyTorch sees no GPU; --cpu tries this command without one")
    about = machine()
    device = about.cpu if cpu else torch.cuda.get_device_name()
    gpu = None if cpu else find(device)
    order = TRIAL if cpu or quick else ORDER
    expected = predictions(PREDICTIONS, gpu)
    sizes = {"dim": 16, "heads": 2, "head_dim": 8} if quick else {}
    with tempfile.TemporaryDirectory() as folder:
        data, shards = Path(folder, "Dataset"), Path(folder, "shards")
        make_noise(data, 32 if quick else UTTERANCES, 4 if quick else SPEAKERS)
        write_lists(data)
        options = shardprep.BuildOptions(val_fraction=0.0)
        shardprep.build_shards(data, shards, options)
        base = Spec(
            "ours",
            str(data),
            str(shards),
            precision=half_precision(gpu, cpu=cpu),
            cpu=cpu,
            **sizes,
        )
        left = minutes - (time.monotonic() - began) / 60
        rows, left_out = measure_all(plan(base, order), expected, left)
    result = {
        **asdict(about),
        "device": device,
        "precision": base.precision,
        "minutes": (time.monotonic() - began) / 60,
        "rows": rows,
        "left_out": left_out,
        "scales": scales(rows, expected),
    }
    click.echo(table(result))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
