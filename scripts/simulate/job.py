"""A training on a cluster in numbers: what is known of it, and what arithmetic alone says of it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

from shardprep.cache.download import CHUNK
from shardprep.cache.shard_cache import DOWNLOADS

# Part of a process's share of the cache that one reader may want, see `shardprep.read.store_map`.
ROOM_SHARE = 0.75


@dataclass(frozen=True)
class Calibration:
    """What was measured of a store and of a machine."""

    request_latency_s: float = 0.03
    """Seconds from a request to the first byte of its answer."""
    stream_mb_per_s: float = 90.0
    """MB/s (10^6 bytes) of one download by itself once its bytes flow, check and disk included."""
    process_mb_per_s: float = 400.0
    """MB/s of all downloads of one process together, where no network limits them."""
    loader_per_s: float = 400_000.0
    """Segments a second that one process makes of shards which are there."""

    @classmethod
    def read(cls, path: Path) -> Calibration:
        """From a JSON object with these names, or from its member "calibration"."""
        found = json.loads(path.read_text())
        found = found.get("calibration", found)
        return cls(**{row.name: float(found[row.name]) for row in fields(cls)})


@dataclass(frozen=True)
class Job:
    """A training, and the cluster that it runs on."""

    utterances: int
    bytes_each: float
    """Of an utterance in its shard, tar header included."""
    samples_per_shard: int
    nodes: int = 1
    ranks: int = 8
    """Processes, and GPUs, of a node."""
    batch: int = 64
    """Segments of a rank's batch."""
    step_s: float = 0.01
    """Seconds of computing a step."""
    lanes: int = 1
    """Lanes of each rank."""
    window_shards: int = 4
    cache_gb: float = 100.0
    """Of each node, 10^9 bytes."""
    node_mb_per_s: float = 1250.0
    """Bandwidth between a node and the store."""
    store_mb_per_s: float = 12500.0
    """Bandwidth of the store to all nodes together."""
    prefetch: int = 2
    """Batches that are prepared ahead."""

    @property
    def world(self) -> int:
        """Processes of all nodes."""
        return self.nodes * self.ranks

    @property
    def global_batch(self) -> int:
        """Segments of a step of all ranks."""
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
        """Bytes of shards that a rank may want at a time."""
        return ROOM_SHARE * self.cache_gb * 1e9 / self.ranks

    @property
    def needed(self) -> float:
        """Bytes of shards that a rank must have at a time, see `shardprep.load.segments`."""
        return min(self.lanes * (2 * self.window_shards + 3) + 1, self.shards) * self.shard_bytes

    @property
    def fits(self) -> bool:
        """Whether the cache has room for what is needed, and there is a batch for every rank."""
        return self.needed <= self.room and self.steps > 0 and self.batch % self.lanes == 0

    def stream(self, calibration: Calibration) -> float:
        """Bytes a second of one download by itself, waiting for answers included."""
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
    """What becomes of an epoch."""

    samples_per_s: float
    waiting: float
    """Share of the time in which ranks stand still for data."""
    seconds: float
    fetched_gb: float
    """By all nodes together."""


def bounds(job: Job, calibration: Calibration) -> dict[str, float]:
    """Samples a second that each part could do if the others took no time, nothing cached."""
    each = job.bytes_each / 1e6
    process = min(calibration.process_mb_per_s, DOWNLOADS * job.stream(calibration) / 1e6)
    return {
        "computing": job.global_batch / job.step_s,
        "making segments": job.world * calibration.loader_per_s,
        "the downloads of a process": job.world * process / each,
        "the network of a node": job.nodes * job.node_mb_per_s / each,
        "the store": job.store_mb_per_s / each,
    }
