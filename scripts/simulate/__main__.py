"""Predict how fast a cluster trains from shards in a store, and recommend shards for it.

    python -m scripts.simulate [--nodes 8] [--step-ms 7] [...] [--calibration FILE] [--json]
    python -m scripts.simulate --recommend [...]        recommend shards, lanes, window and cache
    python -m scripts.simulate --answer                 recommend for the clusters of the page
    python -m scripts.simulate --measure                run real loaders, and compare
    python -m scripts.simulate --markdown               print the tables of docs/scaling.md

The model is in `model.py`; docs/scaling.md, "the page", describes it. The program predicts two
epochs: the first, from empty caches, and the tenth. `--measure` runs epochs of a real loader over
S3, through a proxy with limits, and compares the model with them. `--answer` and `--measure` write
their results to --result, and `--markdown` makes the page's tables from that file.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import click
import msgspec

from scripts.simulate.job import ROOM_SHARE, Calibration, Figures, Job, bounds
from scripts.simulate.model import simulate
from shardprep.bench.machine import machine

RESULT = Path(__file__).parents[1] / "results" / "simulate.json"
LATER = 10
# Shards in the shuffle windows of all lanes from which on a shuffle is nearly as good as chance.
MIXING = 32
PER_SHARD = tuple(50 * 2**power for power in range(9))
SIZES_MB = 8.0, 600.0
# An epoch that reaches this share of a bound is limited by it.
NEAR = 0.7
FRAMES = 540


def stored(frames: int, mels: int) -> float:
    """Bytes of an utterance in a shard of float16: three members of a tar file."""
    return 512 * (math.ceil((128 + 2 * frames * mels) / 512) + 1 + 4)


# The clusters of the page. A step of 7 ms corresponds to the boss recipe at about 50 TFLOP/s: 64
# segments of 5.6 GFLOP.
SETS = {
    "VoxCeleb2-like, 1.1 million, 40 mels": Job(1_100_000, stored(FRAMES, 40), 1_000, step_s=0.007),
    "VoxBlink2-like, 10 million, 80 mels": Job(10_000_000, stored(FRAMES, 80), 1_000, step_s=0.010),
}
NODES = (1, 8, 128)


def predict(job: Job, calibration: Calibration) -> tuple[Figures, Figures]:
    """Figures of the first and of the tenth epoch."""
    (first,) = simulate(job, calibration)
    later = simulate(job, calibration, epochs=2, first=LATER - 2, warm=True)[1]
    return first, later


def limit(job: Job, calibration: Calibration, figures: Figures) -> str:
    """The part that limits the speed of an epoch."""
    if figures.waiting < 0.02:
        return "computing"
    rates = bounds(job, calibration)
    del rates["computing"]
    if figures.samples_per_s > NEAR * rates.pop("making segments"):
        return "making segments"
    # Only shards that are not in the cache use the network.
    fetched = max(figures.fetched_gb * 1e9 / job.set_bytes, 1e-9)
    slowest = min(rates, key=lambda name: rates[name])
    if figures.samples_per_s > NEAR * rates[slowest] / fetched:
        return slowest
    return "the wait for an epoch's first shards"


def recommend(job: Job, calibration: Calibration, disk_gb: float) -> Job:
    """The job with recommended shards, lanes, shuffle window and cache.

    Args:
        job: The training and its cluster; its shards, lanes, window and cache are not used.
        calibration: The measured speeds.
        disk_gb: Disk of a node for the cache.

    Raises:
        ValueError: No choice fits.
    """
    found = []
    for samples in PER_SHARD:
        size = samples * job.bytes_each / 1e6
        choice = replace(job, samples_per_shard=samples, **mixing(job))
        # In an epoch a node reads the set divided by the number of nodes.
        seen = 1.02 * choice.set_bytes * min(1, LATER / job.nodes)
        least = 1.02 * choice.needed * job.ranks / ROOM_SHARE
        cache = max(least, min(seen, disk_gb * 1e9)) / 1e9
        choice = replace(choice, cache_gb=math.ceil(cache * 10) / 10)
        if SIZES_MB[0] <= size <= SIZES_MB[1] and choice.cache_gb <= disk_gb and choice.fits:
            first, later = predict(choice, calibration)
            found.append((first.seconds + (LATER - 1) * later.seconds, choice))
    if not found:
        raise ValueError("no size of shards fits; give more disk, or take fewer ranks")
    best = min(seconds for seconds, _ in found)
    # Prefer larger shards, which are fewer files, if they are at most 2 % slower.
    return [choice for seconds, choice in found if seconds <= 1.02 * best][-1]


def mixing(job: Job) -> dict[str, int]:
    """The lanes and the shuffle window that take the least room and shuffle well."""
    pairs = [
        {"lanes": lanes, "window_shards": window}
        for lanes, window in product((1, 2, 4, 8), (1, 2, 4, 8))
        if job.world * lanes * window >= MIXING and job.batch % lanes == 0
    ]
    return min(pairs, key=lambda pair: replace(job, **pair).needed)


def report(job: Job, calibration: Calibration) -> dict[str, Any]:
    """The figures of a job and what limits them, for JSON."""
    first, later = predict(job, calibration)
    return {
        "job": asdict(job),
        "calibration": asdict(calibration),
        "bounds": bounds(job, calibration),
        "first_epoch": {**asdict(first), "limit": limit(job, calibration, first)},
        "later_epoch": {**asdict(later), "limit": limit(job, calibration, later)},
    }


def table(found: dict[str, Any]) -> str:
    """A report as text."""
    job = Job(**found["job"])
    lines = [
        f"{job.world} ranks on {job.nodes} nodes, {job.steps} steps of {job.step_s * 1000:g} ms an "
        f"epoch, {job.shards} shards of {job.shard_bytes / 1e6:.1f} MB "
        f"({job.samples_per_shard} utterances), {job.lanes} lanes of each rank, shuffle windows of "
        f"{job.window_shards} shards, cache of {job.cache_gb:g} GB on each node"
    ]
    for name, title in (("first_epoch", "epoch 1"), ("later_epoch", f"epoch {LATER}")):
        row = found[name]
        lines.append(
            f"{title:>9}: {row['samples_per_s']:12,.0f} samples/s, {row['waiting']:6.1%} waiting, "
            f"{row['seconds']:9.1f} s, {row['fetched_gb']:9.1f} GB fetched; limit: {row['limit']}"
        )
    return "\n".join(lines)


def answers(calibration: Calibration, disk_gb: float) -> list[dict[str, Any]]:
    """The recommended jobs of the page's clusters."""
    return [
        {"data": name, "job": asdict(recommend(replace(base, nodes=nodes), calibration, disk_gb))}
        for (name, base), nodes in product(SETS.items(), NODES)
    ]


def answered(rows: list[dict[str, Any]], calibration: Calibration) -> str:
    """The page's table of `answers` and their predicted speed, in Markdown."""
    lines = [
        "| data | GPUs | utterances in a shard | lanes x window | cache of a node "
        "| epoch 1, samples/s "
        f"| epoch {LATER}, samples/s | limits | epoch 1, steps ten times as long |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        job = Job(**row["job"])
        first, later = predict(job, calibration)
        (slow,) = simulate(replace(job, step_s=10 * job.step_s), calibration)
        rates = [f"{row.samples_per_s:,.0f} ({row.waiting:.0%} waiting)" for row in (first, later)]
        limits = [limit(job, calibration, figures) for figures in (first, later)]
        lines.append(
            f"| {row['data']} | {job.world:,} "
            f"| {job.samples_per_shard:,} ({job.shard_bytes / 1e6:.0f} MB) "
            f"| {job.lanes} x {job.window_shards} | {job.cache_gb:,.0f} GB "
            f"| {rates[0]} | {rates[1]} | {limits[0]}; then {limits[1]} "
            f"| {slow.waiting:.0%} waiting |"
        )
    return "\n".join(lines)


def partial(calibration: Calibration) -> str:
    """The page's table of caches that hold a part of the set, in Markdown."""
    lines = [
        f"| cache, share of the set | 1 node: share of epoch {LATER} from the cache | samples/s "
        f"| 8 nodes: share of epoch {LATER} from the cache | samples/s |",
        "|---|---|---|---|---|",
    ]
    base = replace(next(iter(SETS.values())), samples_per_shard=400)
    for share in (0.25, 0.5, 0.75, 1.02):
        row = f"| {min(share, 1):.0%} "
        for nodes in (1, 8):
            job = replace(base, nodes=nodes, **mixing(replace(base, nodes=nodes)))
            job = replace(job, cache_gb=share * job.set_bytes / 1e9)
            _, later = predict(job, calibration)
            saved = max(0, 1 - later.fetched_gb * 1e9 / job.set_bytes)
            row += f"| {saved:.0%} | {later.samples_per_s:,.0f} "
        lines.append(f"{row}|")
    return "\n".join(lines)


def check(configurations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare predicted with measured figures, for each epoch of each configuration.

    Args:
        configurations: Objects with name, job, calibration, and the measured epochs.
    """
    found = []
    for row in configurations:
        job, calibration = Job(**row["job"]), Calibration(**row["calibration"])
        predicted = simulate(job, calibration, epochs=len(row["epochs"]))
        for number, (seen, said) in enumerate(zip(row["epochs"], predicted, strict=True), 1):
            found.append(
                {
                    "name": row["name"],
                    "epoch": number,
                    "measured": seen["samples_per_s"],
                    "predicted": said.samples_per_s,
                    "ratio": said.samples_per_s / seen["samples_per_s"],
                    "measured_waiting": seen["waiting"],
                    "predicted_waiting": said.waiting,
                    "measured_gb": seen["fetched_gb"],
                    "predicted_gb": said.fetched_gb,
                }
            )
    return found


def checked(configurations: list[dict[str, Any]]) -> str:
    """The page's table of `check`, in Markdown."""
    lines = [
        "| configuration | epoch | measured, samples/s | predicted | predicted to measured "
        "| waiting, measured | predicted | fetched, measured | predicted |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in check(configurations):
        lines.append(
            f"| {row['name']} | {row['epoch']} "
            f"| {row['measured']:,.0f} | {row['predicted']:,.0f} | {row['ratio']:.2f} "
            f"| {row['measured_waiting']:.0%} | {row['predicted_waiting']:.0%} "
            f"| {row['measured_gb'] * 1000:.0f} MB | {row['predicted_gb'] * 1000:.0f} MB |"
        )
    return "\n".join(lines)


def measured(epochs: int) -> dict[str, Any]:
    """The result of `--measure`."""
    from scripts.simulate.measure import measure_all

    rows = [
        {
            "name": found.trial.name,
            "delay_s": found.trial.delay,
            "job": asdict(found.trial.job),
            "calibration": asdict(found.calibration),
            "epochs": [asdict(figures) for figures in found.epochs],
        }
        for found in measure_all(epochs)
    ]
    about = msgspec.to_builtins(machine())
    return {"machine": about, "configurations": rows}


def markdown(result: dict[str, Any]) -> str:
    """The tables of docs/scaling.md."""
    calibration = Calibration(**result["answers_calibration"])
    rows = answered(result["answers"], calibration)
    return "\n\n".join([rows, partial(calibration), checked(result["configurations"])])


@click.command()
@click.option("--utterances", type=click.IntRange(min=1), default=1_100_000, show_default=True)
@click.option("--frames", type=click.IntRange(min=1), default=FRAMES, show_default=True)
@click.option("--mels", type=click.IntRange(min=1), default=40, show_default=True)
@click.option("--samples-per-shard", type=click.IntRange(min=1), default=1_000, show_default=True)
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True)
@click.option(
    "--ranks", type=click.IntRange(min=1), default=8, show_default=True, help="In a node."
)
@click.option(
    "--batch", type=click.IntRange(min=1), default=64, show_default=True, help="Of a rank."
)
@click.option("--step-ms", type=click.FloatRange(0, min_open=True), default=7.0, show_default=True)
@click.option(
    "--lanes", type=click.IntRange(min=1), default=1, show_default=True, help="Of a rank."
)
@click.option("--window-shards", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--cache-gb", type=float, default=100.0, show_default=True, help="Of a node.")
@click.option("--disk-gb", type=float, default=2_000.0, show_default=True, help="For --recommend.")
@click.option(
    "--node-mb-s", type=float, default=1_250.0, show_default=True, help="Network of a node."
)
@click.option(
    "--store-mb-s", type=float, default=12_500.0, show_default=True, help="Network of the store."
)
@click.option("--calibration", "constants", type=click.Path(exists=True, path_type=Path))
@click.option("--recommend", "choose", is_flag=True, help="Recommend shards, lanes, window, cache.")
@click.option("--answer", "task", flag_value="answer", help="Recommend for the page's clusters.")
@click.option("--measure", "task", flag_value="measure", help="Run real loaders, and compare.")
@click.option("--markdown", "task", flag_value="markdown", help="Print the page's tables.")
@click.option("--epochs", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--json", "as_json", is_flag=True)
@click.option("--result", type=click.Path(dir_okay=False, path_type=Path), default=RESULT)
def main(
    utterances: int,
    frames: int,
    mels: int,
    samples_per_shard: int,
    nodes: int,
    ranks: int,
    batch: int,
    step_ms: float,
    lanes: int,
    window_shards: int,
    cache_gb: float,
    disk_gb: float,
    node_mb_s: float,
    store_mb_s: float,
    constants: Path | None,
    choose: bool,
    task: str | None,
    epochs: int,
    as_json: bool,
    result: Path,
) -> None:
    """Predict how fast a cluster trains from shards in a store, and recommend shards for it.

    docs/scaling.md describes the model.
    """
    calibration = Calibration() if constants is None else Calibration.read(constants)
    if task is None:
        job = Job(
            utterances=utterances,
            bytes_each=stored(frames, mels),
            samples_per_shard=samples_per_shard,
            nodes=nodes,
            ranks=ranks,
            batch=batch,
            step_s=step_ms / 1000,
            lanes=lanes,
            window_shards=window_shards,
            cache_gb=cache_gb,
            node_mb_per_s=node_mb_s,
            store_mb_per_s=store_mb_s,
        )
        try:
            found = report(recommend(job, calibration, disk_gb) if choose else job, calibration)
        except ValueError as error:
            raise click.UsageError(str(error)) from None
        click.echo(json.dumps(found, indent=2) if as_json else table(found))
        return
    known = json.loads(result.read_text()) if result.exists() else {}
    if task == "answer":
        known["answers"] = answers(calibration, disk_gb)
        known["answers_calibration"] = asdict(calibration)
    elif task == "measure":
        known |= measured(epochs)
    else:
        click.echo(markdown(known))
        return
    known["check"] = check(known.get("configurations", []))
    result.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()
