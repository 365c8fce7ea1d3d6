"""How fast shards behind a network are read: the parts of `scripts.bench_remote` about speed."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import shardprep
from scripts.bench_remote.sets import LARGE, WINDOWED, Bench, Result, shards_of
from shardprep.cache.shard_cache import DOWNLOADS

ROOT = Path(__file__).parents[2]


def cold(bench: Bench) -> Result:
    """Bytes a second into an empty cache, and by other ways to download."""
    shards, url = bench.set("large", LARGE)
    files = [(path.name, path.stat().st_size) for path in shards_of(shards)]
    total = sum(size for _, size in files)

    def loader() -> None:
        cache = shardprep.ShardCache(bench.cache())
        split = shardprep.open_shards(url, cache)["train"]
        options = {**WINDOWED, "batch_size": 256, "lanes": 2, "window_shards": 2}
        for _ in shardprep.SegmentLoader(split, **options):
            pass

    def s3fs_get() -> None:
        import s3fs

        system = s3fs.S3FileSystem(skip_instance_cache=True)
        sources = [f"{url}/{name}" for name, _ in files]
        goal = bench.cache("files")
        goal.mkdir()
        system.get(sources, [str(goal / name) for name, _ in files])

    def botocore_get() -> None:
        import botocore.session

        client = botocore.session.get_session().create_client("s3")
        bucket, prefix = url.removeprefix("s3://").split("/", 1)
        goal = bench.cache("files")
        goal.mkdir()

        def get(name: str) -> None:
            body = client.get_object(Bucket=bucket, Key=f"{prefix}/{name}")["Body"]
            with open(goal / name, "wb") as file:
                for block in body.iter_chunks(1 << 20):
                    file.write(block)

        with ThreadPoolExecutor(DOWNLOADS) as threads:
            list(threads.map(get, [name for name, _ in files]))

    ways = {"loader": loader, "s3fs.get": s3fs_get, "botocore, 8 threads": botocore_get}
    rates = measure_in_rounds(ways, bench.rounds, lambda seconds: total / 1e6 / seconds)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    best = max(medians["s3fs.get"], medians["botocore, 8 threads"])
    return {"mb": total / 1e6, "mb_per_s": medians, "rounds": rates,
            "ratio": medians["loader"] / best, "asked": 0.7}  # fmt: skip


def measure_in_rounds(
    ways: dict[str, Callable[[], None]], rounds: int, rate: Callable[[float], float]
) -> dict[str, list[float]]:
    """Rates of each way in every round; the first round does not count."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if number:
                found[name].append(rate(time.perf_counter() - began))
    return found


def warm(bench: Bench) -> Result:
    """Samples a second of training, from a warm cache and from the disk."""
    shards, url = bench.set("large", LARGE)
    cache = bench.cache()
    os.environ["SHARDPREP_CACHE"] = str(cache)
    shardprep.open_shards(url).fetch("train")
    rates: dict[str, list[float]] = {"s3, warm cache": [], "disk": []}
    waits: dict[str, list[float]] = {name: [] for name in rates}
    places = {"s3, warm cache": url, "disk": str(shards)}
    steps = max(60, int(150 * bench.scale))
    for number in range(2 * bench.rounds):
        # Each is first in every second round, in case the machine becomes slower or faster.
        for name in list(places)[:: 1 if number % 2 else -1]:
            runs = bench.cache("runs")
            command = [
                *(sys.executable, ROOT / "trainer/train.py"),
                *("--config", "demo", "--train.runs", runs),
                *("--data.shards", places[name], "--data.order", "windowed", "--data.lanes", "2"),
                *("--data.window_shards", "2", "--train.valid_steps", "0"),
                *("--train.total_steps", steps, "--train.log_steps", "10"),
                *("--train.save_steps", steps),
            ]
            subprocess.run([str(word) for word in command], check=True, capture_output=True)
            lines = next(runs.glob("*/metrics.jsonl")).read_text().splitlines()
            records = [json.loads(line) for line in lines]
            measured = [record for record in records if record["event"] == "train"][1:]
            rates[name] += [record["samples_per_second"] for record in measured]
            waits[name] += [record["waiting"] for record in measured]
    medians = {name: statistics.median(found) for name, found in rates.items()}
    return {"samples_per_s": medians, "records": rates,
            "waiting": {name: statistics.median(found) for name, found in waits.items()},
            "ratio": medians["s3, warm cache"] / medians["disk"], "asked": 0.98}  # fmt: skip
