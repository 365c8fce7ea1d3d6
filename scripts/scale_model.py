"""A model of training from a store: when shards arrive, when they are used, and who waits for whom.

An epoch is played through, event by event. Each rank wants the shards that `WindowedOrder` will
draw from, as many as its part of the node's cache has room for, and fetches a few at once; those
share the bandwidth of their process, their node and the store. A step begins when every rank has
its batch, since ranks wait for one another. Which utterance comes when is the order's own doing;
only its grain is coarser than one utterance where that changes nothing else.
"""

from __future__ import annotations

import heapq
import json
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shardprep.cache import CHUNK, DOWNLOADS
from shardprep.loader import PLANNED
from shardprep.windowed import WindowedOrder

# What windows may want of a process's share of the cache, as in `shardprep.cachedmap`.
ROOM_SHARE = 0.75
# Utterances that an epoch is played with, at least.
FINE = 100_000


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
    """Crops a second that one process makes of shards which are there."""

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
    """Crops of a rank's batch."""
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
        """Crops of a step of all ranks."""
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
        """Bytes of shards that a rank must have at a time, see `shardprep.loader`."""
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


def bounds(job: Job, calibration: Calibration) -> dict[str, float]:
    """Samples a second that each part could do if the others took no time, nothing cached."""
    each = job.bytes_each / 1e6
    process = min(calibration.process_mb_per_s, DOWNLOADS * job.stream(calibration) / 1e6)
    return {
        "computing": job.global_batch / job.step_s,
        "making crops": job.world * calibration.loader_per_s,
        "the downloads of a process": job.world * process / each,
        "the network of a node": job.nodes * job.node_mb_per_s / each,
        "the store": job.store_mb_per_s / each,
    }
