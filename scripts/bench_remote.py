"""Shards behind a network: how fast they are read, and what comes of faults.

    python scripts/bench_remote.py [--only PART]... [--out FILE.json]

A real S3 server (SeaweedFS) runs on this machine for it; faults come from a proxy before it. The
set is made of noise: matrices of 300 x 40, float16, in shards of 24 MB for speed (cold, warm), and
of small shards for the rest.

- cold: an epoch of `SegmentLoader` in windowed order into an empty cache, in turns with getting the
  same objects into files by `s3fs.get` (all at once) and by threads with botocore, as `aws s3 cp`
  does; the faster of the two is the yardstick. Bytes a second, medians.
- warm: training (recipe demo) from S3 with a warm cache, in turns with training from the same
  shards on the disk; samples a second of the log windows, medians.
- budget: an epoch with a cache of a tenth of the data, whose files are summed all the time.
- ranks: four processes share a cache for an epoch; bytes that the server sent of each object.
- outage: an epoch while the server is stopped for 20 s, 5 % of requests are answered with 503, and
  one in 50 bodies is cut short and one in 50 changed; every crop is compared with the local one.
- kills: a reader is killed (SIGKILL) at a random moment of its downloads, over and over; then every
  file in the cache is compared with its name, and an epoch with the local one.
- builds: a build into S3 is killed (SIGKILL, the whole group) at a random moment and continued;
  there must be no manifest before, the set must be byte for byte the local one, and no shard may be
  sent again that was sent whole.

Exit codes: 0 all holds that must (speed is only reported), 1 something was lost, 2 usage.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from noise import make_noise
from servers import Faults, ObjectStore, fault_proxy, object_store

import shardprep
from shardprep.bench.standings import machine
from shardprep.cache import DOWNLOADS

ROOT = Path(__file__).parents[1]
LARGE, SMALL = (16_000, 1000), (4_000, 20)
WINDOWED: dict[str, Any] = {"order": "windowed", "batch_size": 32, "drop_last": False}
Result = dict[str, Any]


class Bench:
    """The store, the sets, and where things are put meanwhile."""

    def __init__(self, folder: Path, store: ObjectStore, scale: float, rounds: int) -> None:
        self.folder, self.store, self.rounds = folder, store, rounds
        self.scale = scale
        self._made: set[str] = set()

    def set(self, name: str, size: tuple[int, int]) -> tuple[Path, str]:
        """A set on the disk and in the store: its folder, and its URL."""
        shards, url = self.folder / name, self.store.url(name)
        if name not in self._made:
            self._made.add(name)
            utterances = max(200, int(size[0] * self.scale))
            make_noise(self.folder / f"{name}-source", utterances)
            per_shard = max(2, int(size[1] * self.scale))
            options = shardprep.BuildOptions(samples_per_shard=per_shard, val_fraction=0.02)
            shardprep.build_shards(self.folder / f"{name}-source", shards, options)
            for path in shards.iterdir():
                (shardprep.locate(url) / path.name).write(path.read_bytes())
        return shards, url

    def cache(self, name: str = "cache", *, empty: bool = True) -> Path:
        """A folder for a cache."""
        folder = self.folder / name
        if empty:
            shutil.rmtree(folder, ignore_errors=True)
        return folder


def shards_of(folder: Path) -> list[Path]:
    """The shards of the split train."""
    return sorted(folder.glob("train-*.tar"))


def crops(place: str | Path, cache: shardprep.ShardCache | None, **options: Any) -> list[str]:
    """A digest of every batch of an epoch."""
    split = shardprep.open_shards(place, cache)["train"]
    loader = shardprep.SegmentLoader(split, **{**WINDOWED, **options})
    return [hashlib.sha256(batch["mel"].numpy()).hexdigest() for batch in loader]


def cold(bench: Bench) -> Result:
    """Bytes a second into an empty cache, and by other means."""
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
    rates = take_turns(ways, bench.rounds, lambda seconds: total / 1e6 / seconds)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    best = max(medians["s3fs.get"], medians["botocore, 8 threads"])
    return {"mb": total / 1e6, "mb_per_s": medians, "rounds": rates,
            "ratio": medians["loader"] / best, "asked": 0.7}  # fmt: skip


def take_turns(
    ways: dict[str, Callable[[], None]], rounds: int, rate: Callable[[float], float]
) -> dict[str, list[float]]:
    """Rates of each way, measured in turns after one that does not count."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if number:
                found[name].append(rate(time.perf_counter() - began))
    return found


def warm(bench: Bench) -> Result:
    """Samples a second of training from a warm cache, and from the disk."""
    shards, url = bench.set("large", LARGE)
    cache = bench.cache()
    os.environ["SHARDPREP_CACHE"] = str(cache)
    shardprep.open_shards(url).fetch("train")
    rates: dict[str, list[float]] = {"s3, warm cache": [], "disk": []}
    waits: dict[str, list[float]] = {name: [] for name in rates}
    places = {"s3, warm cache": url, "disk": str(shards)}
    steps = max(60, int(150 * bench.scale))
    for number in range(2 * bench.rounds):
        # The first of a pair in turn: a machine that grows slower or faster favours nobody.
        for name in list(places)[:: 1 if number % 2 else -1]:
            runs = bench.cache("runs")
            command = [
                *(sys.executable, ROOT / "trainer/train.py"),
                *("--config", ROOT / "trainer/recipes/demo.yaml", "--train.runs", runs),
                *("--data.shards", places[name], "--data.order", "windowed", "--data.lanes", "2"),
                *("--data.window_shards", "2", "--train.valid_steps", "0"),
                *("--train.total_steps", steps, "--train.log_steps", "10"),
                *("--train.save_steps", steps),
            ]
            subprocess.run([str(word) for word in command], check=True, capture_output=True)
            lines = next(runs.glob("*/metrics.jsonl")).read_text().splitlines()
            records = [json.loads(line) for line in lines]
            windows = [r for r in records if r["event"] == "train"][1:]
            rates[name] += [window["samples_per_second"] for window in windows]
            waits[name] += [window["waiting"] for window in windows]
    medians = {name: statistics.median(found) for name, found in rates.items()}
    return {"samples_per_s": medians, "windows": rates,
            "waiting": {name: statistics.median(found) for name, found in waits.items()},
            "ratio": medians["s3, warm cache"] / medians["disk"], "asked": 0.98}  # fmt: skip


def budget(bench: Bench) -> Result:
    """An epoch through a cache of a tenth of the data."""
    shards, url = bench.set("small", SMALL)
    total = sum(path.stat().st_size for path in shards.iterdir() if path.is_file())
    folder, options = bench.cache(), {"lanes": 2, "window_shards": 1}
    cache = shardprep.ShardCache(folder, total // 10)
    with watching(folder) as peak:
        found = crops(url, cache, **options)
    exact = found == crops(shards, None, **options)
    return {"bytes": total, "budget": total // 10, "peak": peak[0], "exact": exact,
            "fetched": cache.traffic.files, "holds": exact and peak[0] <= total // 10}  # fmt: skip


@contextmanager
def watching(folder: Path) -> Iterator[list[int]]:
    """The most bytes that the files of a folder had in sum."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            size = 0
            for path in folder.glob("*"):
                try:
                    size += path.stat().st_size
                except FileNotFoundError:
                    continue
            peak[0] = max(peak[0], size)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def ranks(bench: Bench, world: int = 4) -> Result:
    """What the server sends for an epoch of several processes with one cache."""
    shards, url = bench.set("small", SMALL)
    spawn = multiprocessing.get_context("spawn")
    with fault_proxy(*bench.store.endpoint) as proxy, environment(proxy.url, bench.cache()):
        os.environ["LOCAL_WORLD_SIZE"] = str(world)
        results = spawn.SimpleQueue()
        own = [
            spawn.Process(target=rank_epoch, args=(url, r, world, results)) for r in range(world)
        ]
        for process in own:
            process.start()
        found = dict(results.get() for _ in own)
        for process in own:
            process.join()
        del os.environ["LOCAL_WORLD_SIZE"]
        sent: Counter[str] = Counter()
        for line in proxy.log:
            if line.method == "GET" and (name := re.search(r"(train-\d+\.tar)", line.path)):
                sent[name[1]] += line.bytes
    sizes = {path.name: path.stat().st_size for path in shards_of(shards)}
    expected = {r: list(rank_crops(str(shards), r, world)) for r in range(world)}
    return {"objects": len(sizes), "sent_once": sum(sent[n] == size for n, size in sizes.items()),
            "bytes": sum(sizes.values()), "bytes_sent": sum(sent.values()),
            "exact": found == expected,
            "holds": sent == Counter(sizes) and found == expected}  # fmt: skip


def rank_epoch(url: str, rank: int, world: int, results: Any) -> None:
    """A rank of `ranks`."""
    results.put((rank, list(rank_crops(url, rank, world))))


def rank_crops(place: str, rank: int, world: int) -> list[str]:
    """Digests of a rank's batches."""
    options = {"rank": rank, "world_size": world, "lanes": world, "window_shards": 2}
    return crops(place, None, **options)


@contextmanager
def environment(endpoint: str, cache: Path) -> Iterator[None]:
    """Have this process and those that it starts find the store at `endpoint`."""
    from shardprep import remote

    before = dict(os.environ)
    os.environ.update(AWS_ENDPOINT_URL=endpoint, SHARDPREP_CACHE=str(cache))
    remote.forget_connections()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        remote.forget_connections()


def outage(bench: Bench, pause: float = 20.0) -> Result:
    """An epoch through all faults at once."""
    shards, url = bench.set("small", SMALL)
    expected = crops(shards, None)
    sizes = sum(path.stat().st_size for path in shards_of(shards))
    faults = Faults(busy=0.05, truncate=50, corrupt=50, bandwidth=sizes / 15)
    with (
        fault_proxy(*bench.store.endpoint, faults) as proxy,
        environment(proxy.url, bench.cache()),
    ):
        cache = shardprep.ShardCache(patience=120)
        began = time.perf_counter()
        with ThreadPoolExecutor(1) as threads:
            reading = threads.submit(crops, url, cache)
            time.sleep(4)
            # Here, for the server ends with the thread that has started it.
            bench.store.stop()
            time.sleep(pause)
            bench.store.start()
            found = reading.result()
        seconds = time.perf_counter() - began
        statuses = Counter(line.status for line in proxy.log)
    true = all(is_true(path) for path in cache.folder.path.glob("?" * 64))
    return {"seconds": seconds, "stopped_for_s": pause, "requests": sum(statuses.values()),
            "answers": {str(status): count for status, count in sorted(statuses.items())},
            "bytes": sizes, "bytes_fetched": cache.traffic.bytes, "batches": len(found),
            "holds": found == expected and true}  # fmt: skip


def is_true(path: Path) -> bool:
    """Whether a file of a cache has the contents that its name says."""
    return hashlib.sha256(path.read_bytes()).hexdigest() == path.name


def kills(bench: Bench) -> Result:
    """Readers that are killed while they download."""
    shards, url = bench.set("small", SMALL)
    draw, spawn = random.Random(0), multiprocessing.get_context("spawn")
    sizes = sum(path.stat().st_size for path in shards_of(shards))
    parts = untrue = 0
    count = 4 * bench.rounds
    with (
        fault_proxy(*bench.store.endpoint, Faults(bandwidth=sizes / 8)) as proxy,
        environment(proxy.url, bench.cache()),
    ):
        folder = Path(os.environ["SHARDPREP_CACHE"])
        for number in range(count):
            process = spawn.Process(target=rank_crops, args=(url, 0, 1))
            process.start()
            before = len(list(folder.glob("*")))
            while process.is_alive() and len(list(folder.glob("*"))) < before + 2:
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.3))
            process.kill()
            process.join()
            parts += len(list(folder.glob("*.part")))
            untrue += sum(not is_true(path) for path in folder.glob("?" * 64))
            if number % 4 == 3:
                shutil.rmtree(folder)
        proxy.faults = Faults()
        found = crops(url, None)
        untrue += sum(not is_true(path) for path in folder.glob("?" * 64))
    return {"kills": count, "parts_left": parts, "untrue_files": untrue,
            "holds": not untrue and parts > 0 and found == crops(shards, None)}  # fmt: skip


def builds(bench: Bench) -> Result:
    """Builds into the store that are killed and continued."""
    shards, _ = bench.set("small", SMALL)
    source, draw = bench.folder / "small-source", random.Random(0)
    per_shard = max(2, int(SMALL[1] * bench.scale))
    options = ["--samples-per-shard", str(per_shard), "--val-fraction", "0.02", "--workers", "2"]
    count = 2 * bench.rounds
    same = early = again = killed = 0
    with fault_proxy(*bench.store.endpoint) as proxy, environment(proxy.url, bench.cache()):
        command = [sys.executable, "-m", "shardprep", "build", source]
        for number in range(count):
            place = shardprep.locate(bench.store.url(f"built-{number}"))
            proxy.clear()
            words = [str(word) for word in (*command, place, *options)]
            # In all of its course: builds take a few seconds after a start of one.
            for wait in (draw.uniform(1, 3), draw.uniform(1, 5)):
                process = subprocess.Popen(
                    words, start_new_session=True, stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )  # fmt: skip
                try:
                    process.wait(wait)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    killed += 1
                    early += (place / "manifest.json").exists()
            subprocess.run(words, check=True, capture_output=True)
            stored = {name: (place / name).read() for name in place.listing()}
            local = {path.name: path.read_bytes() for path in shards.iterdir()}
            same += stored == local
            sent = Counter(
                name[1]
                for line in list(proxy.log)
                if line.method == "PUT"
                and line.status == 200
                and (name := re.search(r"/([a-z]+-\d+\.tar)(\?|$)", line.path))
            )
            # What each worker was at when it was killed is sent again.
            again += sum(sent.values()) - sum(name.endswith(".tar") for name in local)
    most = 2 * killed
    return {"builds": count, "kills": killed, "identical": same, "manifest_too_early": early,
            "shards_sent_again": again, "of_that_unavoidable_at_most": most,
            "holds": same == count and not early and again <= most}  # fmt: skip


PARTS: dict[str, Callable[[Bench], Result]] = {
    "cold": cold, "warm": warm, "budget": budget, "ranks": ranks, "outage": outage,
    "kills": kills, "builds": builds,
}  # fmt: skip


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--only", type=click.Choice(list(PARTS)), multiple=True, help="Parts to do.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option(
    "--scale",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=1.0,
    show_default=True,
    help="Size of the sets; below 1 to try the script.",
)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="JSON to write.")
def main(only: tuple[str, ...], rounds: int, scale: float, out: Path | None) -> None:
    """The command; its help is above."""
    results: dict[str, Any] = {}
    if out is not None and out.exists():
        results = json.loads(out.read_text())
    results["machine"] = machine().__dict__
    with tempfile.TemporaryDirectory(prefix="remote-") as name, object_store() as store:
        os.environ.update(store.environment)
        bench = Bench(Path(name), store, scale, rounds)
        for part in only or PARTS:
            click.echo(f"{part} ...", err=True)
            result = PARTS[part](bench)
            results[part] = result
            shown = {k: v for k, v in result.items() if k not in ("rounds", "windows")}
            click.echo(f"{part}: {json.dumps(shown)}")
            if out is not None:
                out.write_text(json.dumps(results, indent=1) + "\n")
    sys.exit(0 if all(results[part].get("holds", True) for part in only or PARTS) else 1)


if __name__ == "__main__":
    main()
