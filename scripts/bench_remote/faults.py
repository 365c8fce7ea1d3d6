"""Reading and building with faults between us and a store: parts of `scripts.bench_remote`."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import shardprep
from scripts.bench_remote.sets import SMALL, Bench, Result, segments, shards_of
from scripts.servers.object_store import Faults, fault_proxy


def budget(bench: Bench) -> Result:
    """An epoch with a cache of a tenth of the data."""
    shards, url = bench.set("small", SMALL)
    total = sum(path.stat().st_size for path in shards.iterdir() if path.is_file())
    folder, options = bench.cache(), {"lanes": 2, "window_shards": 1}
    cache = shardprep.ShardCache(folder, total // 10)
    with watching(folder) as peak:
        found = segments(url, cache, **options)
    exact = found == segments(shards, None, **options)
    return {"bytes": total, "budget": total // 10, "peak": peak[0], "exact": exact,
            "fetched": cache.traffic.files, "holds": exact and peak[0] <= total // 10}  # fmt: skip


@contextmanager
def watching(folder: Path) -> Iterator[list[int]]:
    """The largest size that the files of a folder had together, in a list of one number."""
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
    """The bytes that the server sends for an epoch of several processes with one cache."""
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
    expected = {r: list(rank_segments(str(shards), r, world)) for r in range(world)}
    return {"objects": len(sizes), "sent_once": sum(sent[n] == size for n, size in sizes.items()),
            "bytes": sum(sizes.values()), "bytes_sent": sum(sent.values()),
            "exact": found == expected,
            "holds": sent == Counter(sizes) and found == expected}  # fmt: skip


def rank_epoch(url: str, rank: int, world: int, results: Any) -> None:
    """A rank of `ranks`."""
    results.put((rank, list(rank_segments(url, rank, world))))


def rank_segments(place: str, rank: int, world: int) -> list[str]:
    """Digests of a rank's batches."""
    options = {"rank": rank, "world_size": world, "lanes": world, "window_shards": 2}
    return segments(place, None, **options)


@contextmanager
def environment(endpoint: str, cache: Path) -> Iterator[None]:
    """Let this process and its children find the store at `endpoint`."""
    from shardprep.storage import connections

    before = dict(os.environ)
    os.environ.update(AWS_ENDPOINT_URL=endpoint, SHARDPREP_CACHE=str(cache))
    connections.forget_connections()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        connections.forget_connections()


def outage(bench: Bench, pause: float = 20.0) -> Result:
    """An epoch with all faults at once."""
    shards, url = bench.set("small", SMALL)
    expected = segments(shards, None)
    sizes = sum(path.stat().st_size for path in shards_of(shards))
    faults = Faults(busy=0.05, truncate=50, corrupt=50, bandwidth=sizes / 15)
    with (
        fault_proxy(*bench.store.endpoint, faults) as proxy,
        environment(proxy.url, bench.cache()),
    ):
        cache = shardprep.ShardCache(patience=120)
        began = time.perf_counter()
        with ThreadPoolExecutor(1) as threads:
            reading = threads.submit(segments, url, cache)
            time.sleep(4)
            # In this thread: the server ends with the thread that started it.
            bench.store.stop()
            time.sleep(pause)
            bench.store.start()
            found = reading.result()
        seconds = time.perf_counter() - began
        statuses = Counter(line.status for line in proxy.log)
    intact = all(is_intact(path) for path in cache.folder.path.glob("?" * 64))
    return {"seconds": seconds, "stopped_for_s": pause, "requests": sum(statuses.values()),
            "answers": {str(status): count for status, count in sorted(statuses.items())},
            "bytes": sizes, "bytes_fetched": cache.traffic.bytes, "batches": len(found),
            "holds": found == expected and intact}  # fmt: skip


def is_intact(path: Path) -> bool:
    """Whether the contents of a file in the cache have the sha256 of its name."""
    return hashlib.sha256(path.read_bytes()).hexdigest() == path.name


def kills(bench: Bench) -> Result:
    """Readers that are killed while they download."""
    shards, url = bench.set("small", SMALL)
    draw, spawn = random.Random(0), multiprocessing.get_context("spawn")
    sizes = sum(path.stat().st_size for path in shards_of(shards))
    parts = damaged = 0
    count = 4 * bench.rounds
    with (
        fault_proxy(*bench.store.endpoint, Faults(bandwidth=sizes / 8)) as proxy,
        environment(proxy.url, bench.cache()),
    ):
        folder = Path(os.environ["SHARDPREP_CACHE"])
        for number in range(count):
            process = spawn.Process(target=rank_segments, args=(url, 0, 1))
            process.start()
            before = len(list(folder.glob("*")))
            while process.is_alive() and len(list(folder.glob("*"))) < before + 2:
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.3))
            process.kill()
            process.join()
            parts += len(list(folder.glob("*.part")))
            damaged += sum(not is_intact(path) for path in folder.glob("?" * 64))
            if number % 4 == 3:
                shutil.rmtree(folder)
        proxy.faults = Faults()
        found = segments(url, None)
        damaged += sum(not is_intact(path) for path in folder.glob("?" * 64))
    return {"kills": count, "parts_left": parts, "damaged_files": damaged,
            "holds": not damaged and parts > 0 and found == segments(shards, None)}  # fmt: skip


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
            # A build takes one second to start and then a few seconds: kill it anywhere in there.
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
            # Each worker uploads again the shard that it was at when it was killed.
            again += sum(sent.values()) - sum(name.endswith(".tar") for name in local)
    most = 2 * killed
    return {"builds": count, "kills": killed, "identical": same, "manifest_too_early": early,
            "shards_sent_again": again, "of_that_unavoidable_at_most": most,
            "holds": same == count and not early and again <= most}  # fmt: skip
