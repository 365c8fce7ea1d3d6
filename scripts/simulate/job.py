"""The input and output of the model: a training on a cluster, measured speeds, figures, bounds."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

from shardprep.cache.download import CHUNK
from shardprep.cache.shard_cache import DOWNLOADS

# The part of a process's share of the cache that the wanted shards of one reader may take, see
# `shardprep.read.store_map`.
ROOM_SHARE = 0.75


@dataclass(frozen=True)
class Calibration:
    """Measured speeds of a store and of a machine."""

    request_latency_s: float = 0.03
    """Seconds from a request to the first byte of its answer."""
    stream_mb_per_s: float = 90.0
    """MB/s (10^6 bytes) of a single download after its first byte, with checksum and disk."""
    process_mb_per_s: float = 400.0
    """MB/s of all downloads of one process together, if no network limits them."""
    loader_per_s: float = 400_000.0
    """Segments a second that one process makes from shards in the cache."""

    @classmethod
    def read(cls, path: Path) -> Calibration:
        """Read a JSON object with these names, or its member "calibration"."""
        found = json.loads(path.read_text())
        found = found.get("calibration", found)
        return cls(**{row.name: float(found[row.name]) for row in fields(cls)})


@dataclass(frozen=True)
class Job:
    """A training, and the cluster that it runs on."""

    utterances: int
    bytes_each: float
    """Bytes of an utterance in its shard, with tar headers."""
    samples_per_shard: int
    nodes: int = 1
    ranks: int = 8
    """Processes of each node, one for each GPU."""
    batch: int = 64
    """Segments in a batch of a rank."""
    step_s: float = 0.01
    """Seconds to compute a step."""
    lanes: int = 1
    """Lanes of each rank."""
    window_shards: int = 4
    cache_gb: float = 100.0
    """Cache of each node, in 10^9 bytes."""
    node_mb_per_s: float = 1250.0
    """Bandwidth between a node and the store."""
    store_mb_per_s: float = 12500.0
    """Bandwidth of the store to all nodes together."""
    prefetch: int = 2
    """Batches that a rank prepares in advance."""

    @property
    def world(self) -> int:
        """Processes of all nodes."""
        return self.nodes * self.ranks

    @property
    def global_batch(self) -> int:
        """Segments in a step, of all ranks together."""
        return self.world * self.batch

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return self.utterances // self.global_batch

    @property
    def shards(self) -> int:
        """Shards of the set."""
        return -(-self.utterances // self.samples_per_shard)

    @property
    def shard_bytes(self) -> float:
        """Size of a shard."""
        return self.samples_per_shard * self.bytes_each

    @property
    def set_bytes(self) -> float:
        """Size of all shards."""
        return self.utterances * self.bytes_each

    @property
    def room(self) -> float:
        """Bytes of shards that a rank can hold at a time."""
        return ROOM_SHARE * self.cache_gb * 1e9 / self.ranks

    @property
    def needed(self) -> float:
        """Bytes of shards that a rank must hold at a time, see `shardprep.load.segments`."""
        return min(self.lanes * (2 * self.window_shards + 3) + 1, self.shards) * self.shard_bytes

    @property
    def fits(self) -> bool:
        """Whether the cache has room for `needed`, and there is a batch for every rank."""
        return self.needed <= self.room and self.steps > 0 and self.batch % self.lanes == 0

    def stream(self, calibration: Calibration) -> float:
        """Bytes a second of a single download, with its waits for answers."""
        slowest = min(
            calibration.stream_mb_per_s,
            calibration.process_mb_per_s,
            self.node_mb_per_s,
            self.store_mb_per_s,
        )
        requests = math.ceil(self.shard_bytes / CHUNK)
        waiting = requests * calibration.request_latency_s
        return self.shard_bytes / (waiting + self.shard_bytes / slowest / 1e6)


@dataclass(frozen=True)
class Figures:
    """The figures of an epoch."""

    samples_per_s: float
    waiting: float
    """Share of the time in which ranks wait for data."""
    seconds: float
    fetched_gb: float
    """10^9 bytes that all nodes together fetch."""


def bounds(job: Job, calibration: Calibration) -> dict[str, float]:
    """Samples a second that each part allows, if the others take no time and nothing is cached."""
    each = job.bytes_each / 1e6
    process = min(calibration.process_mb_per_s, DOWNLOADS * job.stream(calibration) / 1e6)
    return {
        "computing": job.global_batch / job.step_s,
        "making segments": job.world * calibration.loader_per_s,
        "the downloads of a process": job.world * process / each,
        "the network of a node": job.nodes * job.node_mb_per_s / each,
        "the store": job.store_mb_per_s / each,
    }
