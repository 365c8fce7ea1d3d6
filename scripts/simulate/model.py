"""A model of training from a store: when shards arrive, and how long steps wait for them.

The model simulates an epoch event by event. Each rank wants the shards that `WindowedOrder` will
draw from next, as many as its part of the node's cache can hold. It downloads a few at a time;
downloads share the bandwidth of their process, their node and the store. A step begins when every
rank has its batch. The order is that of `WindowedOrder`, but to save time the model may treat
several utterances as one.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scripts.simulate.job import Calibration, Figures, Job
from scripts.simulate.network import Network, Node, WantedShard
from shardprep.load.orders.windowed import WindowedOrder
from shardprep.load.read_ahead import PLANNED

# The model may treat several utterances as one, but an epoch has at least FINE of these groups.
FINE = 100_000


@dataclass
class Epoch:
    """When each rank wants which shard."""

    all_wanted: list[list[WantedShard]]
    """The shards of each rank, in the order of their places."""
    at_step: list[list[WantedShard]]
    """The shards of each step that is the first to draw from them."""
    each: int
    """Places of a lane that a step takes."""
    block: int
    """A position may draw from so many places before and after it, see `WindowedOrder`."""


def plan(job: Job, epoch: int, seed: int = 0) -> Epoch:
    """The shards that each rank wants in an epoch, from the order of its utterances."""
    lanes, each = job.world * job.lanes, job.batch // job.lanes
    # The utterances in a group: as many as FINE allows, so that shards and steps are whole groups.
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
    # A lane may begin or end inside a shard: the pieces of shards, and their places in their lane.
    at = np.cumsum(samples[order.shards]) - samples[order.shards]
    borders = np.arange(lanes + 1) * n // lanes
    edges = np.union1d(at, borders[:-1])
    lane = np.searchsorted(borders, edges, side="right") - 1
    slot = np.searchsorted(at, edges, side="right") - 1
    begin, end = edges - borders[lane], np.append(edges[1:], n) - borders[lane]
    # A shard that several lanes share is held for the whole epoch.
    shared = np.bincount(slot, minlength=len(at))[slot] > 1
    begin[shared], end[shared] = 0, n
    positions = np.arange(job.steps * each * lanes)
    step, within = np.divmod(positions, each * lanes)
    rank_of = within // each // job.lanes
    keys = rank_of * len(samples) + order(positions) // per_shard
    used, where = np.unique(keys, return_index=True)
    first = dict(zip(used.tolist(), step[where].tolist(), strict=True))
    found: dict[int, WantedShard] = {}
    rows = zip(lane // job.lanes, order.shards[slot], begin, end, strict=True)
    for rank, shard, start, stop in ((int(a), int(b), int(c), int(d)) for a, b, c, d in rows):
        key = rank * len(samples) + shard
        # Some shards are used only by the utterances after the last step: wanted, but never used.
        wanted = found.setdefault(
            key, WantedShard(rank, shard, start, stop, first.get(key, job.steps))
        )
        wanted.begin, wanted.end = min(wanted.begin, start), max(wanted.end, stop)
    all_wanted: list[list[WantedShard]] = [[] for _ in range(job.world)]
    at_step: list[list[WantedShard]] = [[] for _ in range(job.steps + 1)]
    for wanted in sorted(found.values(), key=lambda wanted: wanted.begin):
        all_wanted[wanted.rank].append(wanted)
        at_step[wanted.first].append(wanted)
    return Epoch(all_wanted, at_step, each, 2 * order.block)


class Reader:
    """The readers of all ranks: which shards they hold, and which they want."""

    def __init__(self, job: Job, network: Network, epochs: Sequence[Epoch]) -> None:
        self._job = job
        self._network = network
        self._epochs = epochs
        spare = (job.room - job.needed) / 2 / job.bytes_each
        planned = int(min(PLANNED, max(spare, 1)))
        #: Steps that are planned at a time.
        self.stride = max(1, planned // job.global_batch)
        self._most = max(1, int(job.room // job.shard_bytes))
        # The shards that each rank holds, with the place at which it releases them.
        self._held: list[list[tuple[int, int, WantedShard]]] = [[] for _ in range(job.world)]
        self._next = [0] * job.world
        self._epoch = -1

    def plan(self, number: int, step: int) -> None:
        """Release the shards before `step` of an epoch, and request the wanted shards after it."""
        epoch = self._epochs[number]
        if number != self._epoch:
            if self._epoch >= 0:
                self._finish_epoch()
            self._epoch, self._next = number, [0] * self._job.world
        place = step * epoch.each
        due = place + self.stride * epoch.each + epoch.block
        last = step + self.stride >= self._job.steps and number + 1 < len(self._epochs)
        for rank, all_wanted in enumerate(epoch.all_wanted):
            held = self._held[rank]
            while held and held[0][0] < place:
                self._release(heapq.heappop(held)[2])
            while self._next[rank] < len(all_wanted):
                wanted = all_wanted[self._next[rank]]
                if wanted.begin > due and len(held) >= self._most:
                    break
                self._next[rank] += 1
                self._hold(wanted, epoch)
            if last:
                # The first shards of the next epoch are wanted already.
                following = self._epochs[number + 1]
                for wanted in following.all_wanted[rank]:
                    if wanted.begin > self.stride * following.each + following.block:
                        break
                    self._hold(wanted, following, self._job.steps * epoch.each)
        self._network.start()

    def _hold(self, wanted: WantedShard, epoch: Epoch, behind: int = 0) -> None:
        if not wanted.held:
            wanted.held = True
            leaves = max(wanted.end + epoch.block, wanted.first * epoch.each) + behind
            heapq.heappush(self._held[wanted.rank], (leaves, id(wanted), wanted))
            self._network.request(wanted)

    def _release(self, wanted: WantedShard) -> None:
        wanted.released = True
        self._network.release(wanted)

    def _finish_epoch(self) -> None:
        """Release all shards but those that the next epoch wants, and count places from 0."""
        for rank, all_wanted in enumerate(self._epochs[self._epoch].all_wanted):
            for wanted in all_wanted:
                if wanted.held and not wanted.released:
                    self._release(wanted)
            passed = self._job.steps * self._epochs[self._epoch].each
            self._held[rank] = [
                (leaves - passed, number, wanted)
                for leaves, number, wanted in self._held[rank]
                if not wanted.released
            ]
            heapq.heapify(self._held[rank])


def simulate(
    job: Job, calibration: Calibration, *, epochs: int = 1, first: int = 0, warm: bool = False
) -> list[Figures]:
    """Simulate consecutive epochs.

    Args:
        job: The training and its cluster.
        calibration: The measured speeds.
        epochs: Number of epochs.
        first: Number of the first epoch.
        warm: Whether the caches begin with the shards that earlier epochs left, instead of empty.

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
            for wanted in epoch.at_step[step]:
                while math.isinf(wanted.arrived):
                    assert network.advance(math.inf), "a needed shard never arrives"
            came = max((wanted.arrived for wanted in epoch.at_step[step]), default=0.0)
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
    """Put into the caches the shards that the epochs from 0 to before `epoch` left there."""
    last = np.full((job.nodes, job.shards), -1, np.int64)
    for past in range(epoch):
        order = WindowedOrder(
            [1] * job.shards, seed, past, global_batch=1, lanes=1, window_shards=1
        )
        slots = np.arange(job.shards)
        # The lanes of a node are neighbours, and are read at the same time.
        node = slots * job.nodes // job.shards
        place = slots % max(1, job.shards // (job.world * job.lanes))
        last[node, order.shards] = past * job.shards + place
    for number, node in enumerate(nodes):
        for shard in np.argsort(-last[number], kind="stable").tolist():
            if last[number, shard] < 0 or node.used + job.shard_bytes > node.budget:
                break
            node.put(shard, job.shard_bytes)
            node.files.move_to_end(shard, last=False)
