"""A model of training from a store: when shards arrive, when they are used, and who waits for whom.

An epoch is played through, event by event. Each rank wants the shards that `WindowedOrder` will
draw from, as many as its part of the node's cache has room for, and fetches a few at once; those
share the bandwidth of their process, their node and the store. A step begins when every rank has
its batch, since ranks wait for one another. Which utterance comes when is the order's own doing;
only its grain is coarser than one utterance where that changes nothing else.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scripts.simulate.job import Calibration, Figures, Job
from scripts.simulate.network import Network, Node, Want
from shardprep.load.order_windowed import WindowedOrder
from shardprep.load.read_ahead import PLANNED

# Utterances that an epoch is played with, at least.
FINE = 100_000


@dataclass
class Epoch:
    """Who needs which shard when."""

    wants: list[list[Want]]
    """By rank, by place."""
    at_step: list[list[Want]]
    """By the step that first draws from them."""
    each: int
    """Places of a lane that a step takes."""
    block: int
    """Places that a position may draw from on either side, see `WindowedOrder`."""


def plan(job: Job, epoch: int, seed: int = 0) -> Epoch:
    """The order of an epoch, as the shards that each rank needs."""
    lanes, each = job.world * job.lanes, job.batch // job.lanes
    # The coarsest grain that leaves an epoch fine enough and shards whole.
    grains = [g for g in range(1, each + 1) if each % g == 0 and job.samples_per_shard % g == 0]
    grain = max([g for g in grains if job.utterances // g >= FINE], default=1)
    each, per_shard, n = each // grain, job.samples_per_shard // grain, job.utterances // grain
    samples = np.full(-(-n // per_shard), per_shard)
    samples[-1] = n - per_shard * (len(samples) - 1)
    order = WindowedOrder(
        samples.tolist(),
        seed,
        epoch,
        global_batch=each * lanes,
        lanes=lanes,
        window_shards=job.window_shards,
    )
    # Pieces of shards within lanes, and where those begin and end in their lane.
    at = np.cumsum(samples[order.shards]) - samples[order.shards]
    borders = np.arange(lanes + 1) * n // lanes
    edges = np.union1d(at, borders[:-1])
    lane = np.searchsorted(borders, edges, side="right") - 1
    slot = np.searchsorted(at, edges, side="right") - 1
    begin, end = edges - borders[lane], np.append(edges[1:], n) - borders[lane]
    # What lanes share stays for the whole epoch.
    shared = np.bincount(slot, minlength=len(at))[slot] > 1
    begin[shared], end[shared] = 0, n
    positions = np.arange(job.steps * each * lanes)
    step, within = np.divmod(positions, each * lanes)
    rank_of = within // each // job.lanes
    keys = rank_of * len(samples) + order(positions) // per_shard
    used, where = np.unique(keys, return_index=True)
    first = dict(zip(used.tolist(), step[where].tolist(), strict=True))
    found: dict[int, Want] = {}
    rows = zip(lane // job.lanes, order.shards[slot], begin, end, strict=True)
    for rank, shard, start, stop in ((int(a), int(b), int(c), int(d)) for a, b, c, d in rows):
        key = rank * len(samples) + shard
        # What only the remainder behind the last step draws from is wanted, but never needed.
        want = found.setdefault(key, Want(rank, shard, start, stop, first.get(key, job.steps)))
        want.begin, want.end = min(want.begin, start), max(want.end, stop)
    wants: list[list[Want]] = [[] for _ in range(job.world)]
    at_step: list[list[Want]] = [[] for _ in range(job.steps + 1)]
    for want in sorted(found.values(), key=lambda want: want.begin):
        wants[want.rank].append(want)
        at_step[want.first].append(want)
    return Epoch(wants, at_step, each, 2 * order.block)


class Reader:
    """The windows of all ranks: which shards they hold and want."""

    def __init__(self, job: Job, network: Network, epochs: Sequence[Epoch]) -> None:
        self._job = job
        self._network = network
        self._epochs = epochs
        spare = (job.room - job.needed) / 2 / job.bytes_each
        planned = int(min(PLANNED, max(spare, 1)))
        #: Steps that are planned at a time.
        self.stride = max(1, planned // job.global_batch)
        self._most = max(1, int(job.room // job.shard_bytes))
        # What each rank holds, by the place from which on it lets it go.
        self._held: list[list[tuple[int, int, Want]]] = [[] for _ in range(job.world)]
        self._next = [0] * job.world
        self._epoch = -1

    def plan(self, number: int, step: int) -> None:
        """Let go of what is behind `step` of an epoch, and want what comes."""
        epoch = self._epochs[number]
        if number != self._epoch:
            if self._epoch >= 0:
                self._leave()
            self._epoch, self._next = number, [0] * self._job.world
        place = step * epoch.each
        due = place + self.stride * epoch.each + epoch.block
        last = step + self.stride >= self._job.steps and number + 1 < len(self._epochs)
        for rank, wants in enumerate(epoch.wants):
            held = self._held[rank]
            while held and held[0][0] < place:
                self._let_go(heapq.heappop(held)[2])
            while self._next[rank] < len(wants):
                want = wants[self._next[rank]]
                if want.begin > due and len(held) >= self._most:
                    break
                self._next[rank] += 1
                self._take(want, epoch)
            if last:
                # What the next epoch begins with is wanted already.
                following = self._epochs[number + 1]
                for want in following.wants[rank]:
                    if want.begin > self.stride * following.each + following.block:
                        break
                    self._take(want, following, self._job.steps * epoch.each)
        self._network.start()

    def _take(self, want: Want, epoch: Epoch, behind: int = 0) -> None:
        if not want.held:
            want.held = True
            leaves = max(want.end + epoch.block, want.first * epoch.each) + behind
            heapq.heappush(self._held[want.rank], (leaves, id(want), want))
            self._network.ask(want)

    def _let_go(self, want: Want) -> None:
        want.over = True
        self._network.let_go(want)

    def _leave(self) -> None:
        """Let go of what only the epoch before wanted; places begin anew."""
        for rank, wants in enumerate(self._epochs[self._epoch].wants):
            for want in wants:
                if want.held and not want.over:
                    self._let_go(want)
            passed = self._job.steps * self._epochs[self._epoch].each
            self._held[rank] = [
                (leaves - passed, number, want)
                for leaves, number, want in self._held[rank]
                if not want.over
            ]
            heapq.heapify(self._held[rank])


def simulate(
    job: Job, calibration: Calibration, *, epochs: int = 1, first: int = 0, warm: bool = False
) -> list[Figures]:
    """Figures of some epochs in a row.

    Args:
        job: What is trained, and where.
        calibration: What was measured.
        epochs: How many.
        first: Number of the first.
        warm: Whether nodes begin with what the epochs before have left in their caches, instead of
            with nothing.

    Raises:
        ValueError: The cache is too small for the job, or an epoch has no step.
    """
    if not job.fits:
        raise ValueError(
            f"a rank needs {job.needed / 1e9:.3g} GB of shards at a time and has room for "
            f"{job.room / 1e9:.3g} GB, in {job.steps} steps an epoch"
        )
    plans = [plan(job, first + number) for number in range(epochs)]
    nodes = [Node(job.cache_gb * 1e9) for _ in range(job.nodes)]
    if warm:
        fill(job, nodes, first)
    network = Network(job, calibration, nodes)
    reader = Reader(job, network, plans)
    prepare = job.batch / calibration.loader_per_s
    ends: deque[float] = deque([0.0], job.prefetch + 1)
    figures, ready = [], 0.0
    for number, epoch in enumerate(plans):
        began, before, waited = ends[-1], network.fetched, 0.0
        for step in range(job.steps):
            while network.now < ends[-1] and network.advance(ends[-1]):
                pass
            if step == 0:
                reader.plan(number, 0)
            ahead = step + job.prefetch
            if ahead % reader.stride == 0 and 0 < ahead < job.steps:
                reader.plan(number, ahead)
            for want in epoch.at_step[step]:
                while math.isinf(want.arrived):
                    assert network.advance(math.inf), "what is needed never comes"
            came = max((want.arrived for want in epoch.at_step[step]), default=0.0)
            ready = max(ready, came, ends[0]) + prepare
            begin = max(ready, ends[-1])
            waited += begin - ends[-1]
            ends.append(begin + job.step_s)
        seconds = ends[-1] - began
        samples = job.steps * job.global_batch / seconds
        fetched = (network.fetched - before) / 1e9
        figures.append(Figures(samples, waited / seconds, seconds, fetched))
    return figures


def fill(job: Job, nodes: list[Node], epoch: int, seed: int = 0) -> None:
    """Put into the caches what the epochs before `epoch`, down to 0, have left."""
    last = np.full((job.nodes, job.shards), -1, np.int64)
    for past in range(epoch):
        order = WindowedOrder(
            [1] * job.shards, seed, past, global_batch=1, lanes=1, window_shards=1
        )
        slots = np.arange(job.shards)
        # A node's lanes lie side by side, and are read at the same time.
        node = slots * job.nodes // job.shards
        place = slots % max(1, job.shards // (job.world * job.lanes))
        last[node, order.shards] = past * job.shards + place
    for number, node in enumerate(nodes):
        for shard in np.argsort(-last[number], kind="stable").tolist():
            if last[number, shard] < 0 or node.used + job.shard_bytes > node.budget:
                break
            node.put(shard, job.shard_bytes)
            node.files.move_to_end(shard, last=False)
