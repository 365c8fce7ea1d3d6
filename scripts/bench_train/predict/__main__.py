"""Predict how fast the recipes train on GPUs, from the kernels of their steps.

    python -m scripts.bench_train.predict [--no-check] [--no-gpus] [--compiler]
        [--calibration gpu.json] [--out scripts/results/predict.json]

Each recipe's step runs once on the CPU, on a few segments, and every operation is noted: its
arithmetic, and the bytes that it reads and writes. Fused as a compiler does, or one by one, they
are the kernels of the step. A kernel takes the time of its arithmetic or that of its bytes,
whichever is longer, at a share of the rates in a GPU's data sheet. For an eager step the time of
the host to start all kernels may be longer than both.

The shares are assumed (`rates.Shares`), unless --calibration gives a result of
`scripts.bench_train.gpu`: they are then scaled by what boss took on that machine. The check tests
the method on the CPU at hand: from the rates of one recipe's step, measured, it predicts the steps
of the other recipes, and measures them. Networks whose speed on a GPU others have published are
predicted beside it. With --compiler, TorchInductor compiles the step of boss, and its kernels are
counted beside ours.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from scripts.bench_train.gpus import find
from scripts.bench_train.predict import published
from scripts.bench_train.predict.check import CALIBRATED_ON, check
from scripts.bench_train.predict.compiler import compare
from scripts.bench_train.predict.rates import ASSUMED, Shares, step_seconds
from scripts.bench_train.predict.steps import NAMES, Count, count
from scripts.bench_train.predict.table import table
from shardprep.bench.machine import machine

PREDICTED_GPUS = ("T4", "A100", "H100", "H200")
BATCHES = (32, 128, 512, 2048, 4096)
WAYS = ("eager", "compiled", "graphs")
COMPILED_BATCH = 8
# Memory beside what the forward pass keeps: gradients on their way, the allocator's gaps.
MEMORY_FACTOR, USABLE = 1.25, 0.9


def predict(
    counts: dict[str, Count], shares: Shares = ASSUMED, batches: Sequence[int] = BATCHES
) -> list[dict[str, Any]]:
    """Predicted speed of each recipe, on each GPU, in each way, for each batch size."""
    rows = []
    for gpu in filter(None, map(find, PREDICTED_GPUS)):
        for name, counted in counts.items():
            for way in WAYS:
                kernels = counted.eager if way == "eager" else counted.fused
                for batch in batches:
                    device, host = step_seconds(kernels, gpu, way, batch, shares)
                    rate = batch / max(device, host)
                    needed = counted.memory[0] + MEMORY_FACTOR * batch * counted.memory[1]
                    rows.append(
                        {
                            "gpu": gpu.name,
                            "recipe": name,
                            "way": way,
                            "batch": batch,
                            "device_s": device,
                            "host_s": host,
                            "segments_per_s": rate,
                            "share_of_peak": rate * counted.flops / (gpu.half * 1e12),
                            "hours": counted.segments / rate / 3600,
                            "fits": needed < USABLE * gpu.memory * 1e9,
                        }
                    )
    return rows


def describe(counted: Count) -> dict[str, Any]:
    """The sums over a recipe's kernels, for each segment and without segments."""
    return {
        "flops_per_segment": counted.flops,
        "segments": counted.segments,
        "kept_bytes": counted.memory,
        **{
            way: {
                "kernels": len(kernels),
                "bytes": [sum(one.bytes[part] for one in kernels) for part in (0, 1)],
            }
            for way, kernels in (("eager", counted.eager), ("fused", counted.fused))
        },
    }


@click.command(context_settings={"show_default": True})
@click.option("--check/--no-check", "checks", default=True, help="Test the method on this CPU.")
@click.option("--gpus/--no-gpus", default=True, help="Count the kernels and predict GPUs.")
@click.option(
    "--compiler", "compiles", is_flag=True, help="Count beside TorchInductor; takes minutes."
)
@click.option("--batch", type=click.IntRange(min=1), default=32, help="Segments, for the check.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, help="Steps timed in the check.")
@click.option(
    "--calibration",
    type=click.Path(exists=True, path_type=Path, dir_okay=False),
    help="Result of scripts.bench_train.gpu.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Result file (JSON); keeps what it has of the part that is left out.",
)
def main(
    checks: bool,
    gpus: bool,
    compiles: bool,
    batch: int,
    rounds: int,
    calibration: Path | None,
    out: Path | None,
) -> None:
    """Predict the speed of training on GPUs, and check the method on this CPU."""
    result: dict[str, Any] = {}
    if out is not None and out.exists():
        result = json.loads(out.read_text())
    result.update(asdict(machine()))
    if checks:
        result["check"] = check(batch, rounds)
    if compiles:
        result["compiler"] = compare(CALIBRATED_ON, COMPILED_BATCH)
    if gpus:
        result["published"] = published.compare()
        counts = {}
        for name in NAMES:
            click.echo(f"counting {name}", err=True)
            counts[name] = count(name)
        result["counts"] = {name: describe(one) for name, one in counts.items()}
        measured = None if calibration is None else json.loads(calibration.read_text())
        scales = {"device": 1.0, "host": 1.0} if measured is None else measured["scales"]
        shares = ASSUMED.scaled(**scales)
        result["calibrated_on"] = measured and measured["device"]
        result["shares"] = asdict(shares)
        result["gpus"] = predict(counts, shares)
    click.echo(table(result))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
