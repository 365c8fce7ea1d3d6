"""The network of the model: downloads from a store into the caches of nodes."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from scripts.simulate.job import Calibration, Job
from shardprep.cache.shard_cache import DOWNLOADS


@dataclass(eq=False)
class WantedShard:
    """A shard that a rank wants in an epoch."""

    rank: int
    shard: int
    begin: int
    """First place in the rank's lane that draws from the shard."""
    end: int
    """End of these places."""
    first: int
    """First step that draws from the shard."""
    arrived: float = math.inf
    held: bool = False
    released: bool = False
    """Whether it was held and released again."""


@dataclass
class Node:
    """The cache of a node; the least recently used shards that no rank holds are removed first."""

    budget: float
    files: OrderedDict[int, float] = field(default_factory=OrderedDict)
    """Bytes of each shard, also of those in download, in the order of use."""
    held: Counter[int] = field(default_factory=Counter)
    coming: dict[int, list[WantedShard]] = field(default_factory=dict)
    used: float = 0.0

    def make_room(self, size: float) -> bool:
        """Remove shards until `size` more bytes fit; returns whether they do."""
        lacking = self.used + size - self.budget
        going = []
        for shard, bytes_ in self.files.items():
            if lacking <= 0:
                break
            if not self.held[shard] and shard not in self.coming:
                going.append(shard)
                lacking -= bytes_
        for shard in going:
            self.used -= self.files.pop(shard)
        return lacking <= 0

    def put(self, shard: int, size: float) -> None:
        """Add a file, as the most recently used."""
        self.files[shard] = size
        self.used += size


class Network:
    """Downloads that share bandwidth."""

    def __init__(self, job: Job, calibration: Calibration, nodes: list[Node]) -> None:
        self.now = 0.0
        self.fetched = 0.0
        self._job = job
        self._nodes = nodes
        self._size = job.shard_bytes
        self._stream = job.stream(calibration)
        self._process = calibration.process_mb_per_s * 1e6
        self._queues: list[deque[WantedShard]] = [deque() for _ in range(job.world)]
        self._busy = np.zeros(job.world, np.int64)
        self._left: NDArray[np.float64] = np.empty(0)
        self._ranks: NDArray[np.int64] = np.empty(0, np.int64)
        self._shards: list[int] = []
        self._rates: NDArray[np.float64] | None = None

    def request(self, wanted: WantedShard) -> None:
        """A rank wants a shard from now on."""
        node = self._nodes[wanted.rank // self._job.ranks]
        node.held[wanted.shard] += 1
        if wanted.shard in node.coming:
            node.coming[wanted.shard].append(wanted)
        elif wanted.shard in node.files:
            node.files.move_to_end(wanted.shard)
            wanted.arrived = self.now
        else:
            self._queues[wanted.rank].append(wanted)

    def release(self, wanted: WantedShard) -> None:
        """A rank wants a shard no longer."""
        self._nodes[wanted.rank // self._job.ranks].held[wanted.shard] -= 1

    def start(self) -> None:
        """Begin as many downloads as possible."""
        added: list[WantedShard] = []
        for rank, queue in enumerate(self._queues):
            node = self._nodes[rank // self._job.ranks]
            while queue and self._busy[rank] < DOWNLOADS:
                shard = queue[0].shard
                if shard in node.coming:
                    node.coming[shard].append(queue.popleft())
                elif shard in node.files:
                    queue.popleft().arrived = self.now
                elif node.make_room(self._size):
                    node.put(shard, self._size)
                    node.coming[shard] = [queue[0]]
                    added.append(queue.popleft())
                    self._busy[rank] += 1
                else:
                    break
        if added:
            self._left = np.append(self._left, np.full(len(added), self._size))
            self._ranks = np.append(self._ranks, [wanted.rank for wanted in added])
            self._shards += [wanted.shard for wanted in added]
            self._rates = None

    def advance(self, until: float) -> bool:
        """Let time pass until the next arrival or `until`; returns whether a shard arrived."""
        if not len(self._left):
            self.now = max(self.now, until) if math.isfinite(until) else self.now
            return False
        if self._rates is None:
            self._rates = self._share()
        seconds = self._left / self._rates
        passed = min(float(seconds.min()), until - self.now)
        self._left = self._left - passed * self._rates
        self.now += passed
        done = seconds <= passed * (1 + 1e-9)
        if not done.any():
            return False
        for place in np.flatnonzero(done).tolist():
            rank, shard = int(self._ranks[place]), self._shards[place]
            self._busy[rank] -= 1
            for wanted in self._nodes[rank // self._job.ranks].coming.pop(shard):
                wanted.arrived = self.now
        self.fetched += self._size * int(done.sum())
        self._left, self._ranks = self._left[~done], self._ranks[~done]
        self._shards = [s for s, over in zip(self._shards, done.tolist(), strict=True) if not over]
        self._rates = None
        self.start()
        return True

    def _share(self) -> NDArray[np.float64]:
        """The bandwidth of each download in bytes a second."""
        mine = np.bincount(self._ranks, minlength=self._job.world)[self._ranks]
        rates = np.minimum(self._stream, self._process / mine)
        node = self._ranks // self._job.ranks
        total = np.bincount(node, rates, self._job.nodes)[node]
        rates = rates * np.minimum(1, self._job.node_mb_per_s * 1e6 / total)
        shared: NDArray[np.float64] = rates * min(1, self._job.store_mb_per_s * 1e6 / rates.sum())
        return shared
