"""Measure epochs of a loader over S3, through a proxy with limits, to compare the model with.

Instead of training, all ranks pause for a known time in each step, and wait for each other.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import shardprep
from scripts.servers.object_store import Faults, ObjectStore, fault_proxy, object_store
from scripts.simulate.job import Calibration, Figures, Job
from scripts.synthetic.noise import make_noise
from shardprep.cache.shard_cache import DOWNLOADS, ShardCache
from shardprep.storage.connections import forget_connections
from shardprep.storage.remote import Remote

UTTERANCES, PER_SHARD = 4_000, 100
NAME = "scale"


@dataclass(frozen=True)
class Trial:
    """A job, and the limits of the proxy."""

    name: str
    job: Job
    delay: float = 0.0
    """Seconds before each answer."""


@dataclass
class Measured:
    """A trial and its measured epochs; the first begins with an empty cache."""

    trial: Trial
    calibration: Calibration
    epochs: list[Figures] = field(default_factory=list)


def trials(bytes_each: float) -> list[Trial]:
    """All trials to measure."""
    base = Job(
        utterances=UTTERANCES,
        bytes_each=bytes_each,
        samples_per_shard=PER_SHARD,
        ranks=1,
        batch=32,
        lanes=2,
        window_shards=2,
        cache_gb=1.0,
    )
    fast = replace(base, step_s=0.01)
    return [
        Trial("computing", replace(base, step_s=0.04, node_mb_per_s=40.0)),
        Trial("bandwidth", replace(fast, node_mb_per_s=10.0)),
        Trial("latency", replace(fast, node_mb_per_s=100.0), delay=0.5),
        Trial(
            "small cache, 2 ranks",
            replace(fast, ranks=2, lanes=1, node_mb_per_s=15.0, cache_gb=0.06),
        ),
    ]


def make_set(folder: Path) -> float:
    """Write shards of noise, and return the bytes of an utterance in them."""
    source, shards = folder / "Dataset", folder / "shards"
    make_noise(source, UTTERANCES)
    options = shardprep.BuildOptions(samples_per_shard=PER_SHARD, val_fraction=0, workers=1)
    shardprep.build_shards(source, shards, options)
    return sum(path.stat().st_size for path in shards.glob("train-*.tar")) / UTTERANCES


@contextmanager
def served(folder: Path) -> Iterator[ObjectStore]:
    """A store with the set in `folder`/shards; this process finds it through its environment."""
    import s3fs

    with object_store(folder / "store") as store, mock.patch.dict(os.environ, store.environment):
        s3fs.S3FileSystem(skip_instance_cache=True).put(
            str(folder / "shards"), store.url(NAME), recursive=True
        )
        # This process may have connections to another store.
        forget_connections()
        try:
            yield store
        finally:
            forget_connections()


def calibrate(url: str, folder: Path) -> Calibration:
    """Measure the speeds of this machine and this store, without limits."""
    manifest = Remote(f"{url}/manifest.json")
    manifest.read(0, 1)
    latencies = []
    for _ in range(20):
        began = time.perf_counter()
        manifest.read(0, 1)
        latencies.append(time.perf_counter() - began)
    latency = statistics.median(latencies)
    with_one, with_all = ShardCache(folder / "one"), ShardCache(folder / "all")
    shard_set = shardprep.open_shards(url, with_one)
    shards = shard_set.manifest.splits["train"].shards[: 2 * DOWNLOADS]
    began = time.perf_counter()
    for shard in shards:
        with_one.hold(Remote(f"{url}/{shard.file}"), shard).close()
    seconds = time.perf_counter() - began - latency * len(shards)
    stream = sum(shard.bytes for shard in shards) / seconds / 1e6
    shard_set = shardprep.open_shards(url, with_all)
    began = time.perf_counter()
    shard_set.fetch("train")
    process = shard_set["train"].nbytes / (time.perf_counter() - began) / 1e6
    loader = shardprep.SegmentLoader(shard_set["train"], batch_size=32, order="windowed")
    rates = []
    for _ in range(6):
        began = time.perf_counter()
        segments = sum(len(batch["label"]) for batch in loader)
        rates.append(segments / (time.perf_counter() - began))
    return Calibration(latency, stream, process, statistics.median(rates[1:]))


def measure(trial: Trial, store: ObjectStore, folder: Path, epochs: int) -> list[Figures]:
    """Measure the epochs of a trial, beginning with an empty cache."""
    job = trial.job
    limits = Faults(delay=trial.delay, bandwidth=job.node_mb_per_s * 1e6)
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(job.ranks), spawn.SimpleQueue()
    environment = {
        "SHARDPREP_CACHE": str(folder),
        "SHARDPREP_CACHE_GB": str(job.cache_gb),
        "LOCAL_WORLD_SIZE": str(job.ranks),
    }
    with (
        fault_proxy(*store.endpoint, limits) as proxy,
        mock.patch.dict(os.environ, environment, AWS_ENDPOINT_URL=proxy.url),
    ):
        ranks = [
            spawn.Process(target=train, args=(rank, job, store.url(NAME), epochs, barrier, results))
            for rank in range(job.ranks)
        ]
        sent = [0]
        for process in ranks:
            process.start()
        found = []
        for _ in range(epochs):
            figures: Figures = results.get()
            sent.append(sum(line.bytes for line in list(proxy.log) if ".tar" in line.path))
            found.append(replace(figures, fetched_gb=(sent[-1] - sent[-2]) / 1e9))
        for process in ranks:
            process.join()
    return found


def train(rank: int, job: Job, url: str, epochs: int, barrier: Any, results: Any) -> None:
    """Run a rank: it reads its batches, and pauses for each."""
    split = shardprep.open_shards(url)["train"]
    loader = shardprep.SegmentLoader(
        split,
        batch_size=job.batch,
        rank=rank,
        world_size=job.world,
        order="windowed",
        lanes=job.world * job.lanes,
        window_shards=job.window_shards,
        prefetch=job.prefetch,
    )
    for _ in range(epochs):
        barrier.wait()
        began = ready = time.perf_counter()
        waited, steps = 0.0, 0
        for _ in loader:
            barrier.wait()
            waited += time.perf_counter() - ready
            time.sleep(job.step_s)
            ready = time.perf_counter()
            steps += 1
        seconds = time.perf_counter() - began
        if rank == 0:
            rate = steps * job.global_batch / seconds
            results.put(Figures(rate, waited / seconds, seconds, 0.0))


def measure_all(epochs: int = 3, names: tuple[str, ...] = ()) -> list[Measured]:
    """Measure all trials, or those with these names."""
    found = []
    with tempfile.TemporaryDirectory(prefix="scale-") as name:
        folder = Path(name)
        bytes_each = make_set(folder)
        with served(folder) as store:
            calibration = calibrate(store.url(NAME), folder)
            for trial in trials(bytes_each):
                if not names or trial.name in names:
                    latency = calibration.request_latency_s + trial.delay
                    constants = replace(calibration, request_latency_s=latency)
                    with tempfile.TemporaryDirectory(dir=folder) as cache:
                        measured = measure(trial, store, Path(cache), epochs)
                    found.append(Measured(trial, constants, measured))
    return found
