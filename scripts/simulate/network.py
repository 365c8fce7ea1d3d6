"""Shards on their way from a store to the caches of nodes, in the time of a model."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from scripts.simulate.job import Calibration, Job
from shardprep.cache.shard_cache import DOWNLOADS


@dataclass(eq=False)
class Want:
    """A shard that a rank needs in an epoch."""

    rank: int
    shard: int
    begin: int
    """Place in the rank's lanes where it begins, and where it ends."""
    end: int
    first: int
    """Step that first draws from it."""
    arrived: float = math.inf
    held: bool = False
    over: bool = False
    """Whether it has been held, and let go."""


@dataclass
class Node:
    """The cache of a node: the least recently used of what no rank holds makes room."""

    budget: float
    files: OrderedDict[int, float] = field(default_factory=OrderedDict)
    """Shard to bytes, those that are on their way included, in the order of use."""
    held: Counter[int] = field(default_factory=Counter)
    coming: dict[int, list[Want]] = field(default_factory=dict)
    used: float = 0.0

    def make_room(self, size: float) -> bool:
        """Have room for so many bytes, if that can be."""
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
        """Take a file in, as the one used last."""
        self.files[shard] = size
        self.used += size


class Network:
    """Downloads that share the bandwidth there is."""

    def __init__(self, job: Job, calibration: Calibration, nodes: list[Node]) -> None:
        self.now = 0.0
        self.fetched = 0.0
        self._job = job
        self._nodes = nodes
        self._size = job.shard_bytes
        self._stream = job.stream(calibration)
        self._process = calibration.process_mb_per_s * 1e6
        self._queues: list[deque[Want]] = [deque() for _ in range(job.world)]
        self._busy = np.zeros(job.world, np.int64)
        self._left: NDArray[np.float64] = np.empty(0)
        self._ranks: NDArray[np.int64] = np.empty(0, np.int64)
        self._shards: list[int] = []
        self._rates: NDArray[np.float64] | None = None

    def ask(self, want: Want) -> None:
        """Have a rank want a shard from now on."""
        node = self._nodes[want.rank // self._job.ranks]
        node.held[want.shard] += 1
        if want.shard in node.coming:
            node.coming[want.shard].append(want)
        elif want.shard in node.files:
            node.files.move_to_end(want.shard)
            want.arrived = self.now
        else:
            self._queues[want.rank].append(want)

    def let_go(self, want: Want) -> None:
        """Have a rank want a shard no longer."""
        self._nodes[want.rank // self._job.ranks].held[want.shard] -= 1

    def start(self) -> None:
        """Begin as many downloads as may be."""
        added: list[Want] = []
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
            self._ranks = np.append(self._ranks, [want.rank for want in added])
            self._shards += [want.shard for want in added]
            self._rates = None

    def advance(self, until: float) -> bool:
        """Let time pass, at most to the next arrival; whether one came."""
        if not len(self._left):
            self.now = max(self.now, until) if math.isfinite(until) else self.now
            return False
        if self._rates is None:
            self._rates = self._share()
        needs = self._left / self._rates
        passed = min(float(needs.min()), until - self.now)
        self._left = self._left - passed * self._rates
        self.now += passed
        done = needs <= passed * (1 + 1e-9)
        if not done.any():
            return False
        for place in np.flatnonzero(done).tolist():
            rank, shard = int(self._ranks[place]), self._shards[place]
            self._busy[rank] -= 1
            for want in self._nodes[rank // self._job.ranks].coming.pop(shard):
                want.arrived = self.now
        self.fetched += self._size * int(done.sum())
        self._left, self._ranks = self._left[~done], self._ranks[~done]
        self._shards = [s for s, over in zip(self._shards, done.tolist(), strict=True) if not over]
        self._rates = None
        self.start()
        return True

    def _share(self) -> NDArray[np.float64]:
        """Bytes a second of each download."""
        mine = np.bincount(self._ranks, minlength=self._job.world)[self._ranks]
        rates = np.minimum(self._stream, self._process / mine)
        node = self._ranks // self._job.ranks
        total = np.bincount(node, rates, self._job.nodes)[node]
        rates = rates * np.minimum(1, self._job.node_mb_per_s * 1e6 / total)
        shared: NDArray[np.float64] = rates * min(1, self._job.store_mb_per_s * 1e6 / rates.sum())
        return shared
