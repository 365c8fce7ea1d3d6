"""Batches of random segments, from a split's memory maps to PyTorch tensors.

Axis legend: B batch, T frames, F mel bins.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Sequence
from functools import partial
from numbers import Rational
from typing import Any, Literal

import torch
from torch.utils.data import IterableDataset

from shardprep.errors import CorruptShardError, ShardprepError
from shardprep.load.batch_maker import Batch, BatchMaker, Made
from shardprep.load.course.iteration import Iteration
from shardprep.load.course.position import Position, Stretch, check_same
from shardprep.load.course.world import Part, refuse_second_division, this_worker
from shardprep.load.damage import OnCorrupt, ReadGuard, VerifyReads
from shardprep.load.epochs_ahead import EpochsAhead
from shardprep.load.on_device import fits
from shardprep.load.plan import Balance, BatchPlan, Order, Sampling, check_split
from shardprep.read.split import Split

Placement = Literal["auto", "host", "device"]


class SegmentLoader(IterableDataset[Batch]):
    """Random segments of fixed length; over all ranks, every utterance once an epoch.

    It behaves as PyTorch's DataLoader does: `iter` begins a new epoch with an order of its own,
    whether the iteration before ran out, stopped after `len` batches or was broken off, and ends
    that iteration. Only after `load_state_dict` it continues within an epoch. It works as the
    dataset of a DataLoader too, with batch_size=None, and in the loops of docs/loops.md.

    Global batch k of an epoch holds the same utterances with the same segments at any world size,
    as long as batch_size * world_size is the same; each rank gathers only its own part.

    Args:
        split: What to read.
        batch_size: Segments a batch of this rank.
        segment_frames: Frames T a segment; shorter utterances are padded at their end.
        seed: Decides order and segments.
        rank: This process's number. By default it is found whenever an epoch begins: from
            torch.distributed where that is initialised, else from the variable RANK.
        world_size: Number of processes; by default found likewise, from WORLD_SIZE.
        shuffle: Whether utterances come in random order with random segments. Otherwise they come
            in the split's order, and each segment begins at the first frame.
        drop_last: Whether to leave out the last len(split) % (batch_size * world_size)
            utterances of an epoch's order. Otherwise they form a last, smaller batch, divided
            evenly among the ranks. Every rank yields equally many batches; the last batch of a
            rank may be empty.
        pad_value: Fills padded frames.
        order: "global" shuffles the whole split: for data that fit into memory, or lie on a fast
            disk or on the device. "windowed" reads the shards one after another and shuffles
            within a shuffle window: for data larger than memory; see
            `shardprep.load.orders.windowed`.
        lanes: Sequences of shards that "windowed" reads side by side; a multiple of the world
            size that divides the batch of all ranks.
        window_shards: Shards in the shuffle window of each lane.
        shares: How often each set comes, of a split of several sets: with [3, 1], of every four
            utterances three are from the first set, to within one utterance at any time. Each set
            comes in epochs of its own, each utterance once in each of them, which go on over the
            epochs of the loader. Whole numbers, fractions or floats;
            see `shardprep.load.orders.mixed`. None reads all sets as one.
        balance: "speaker" draws every speaker equally often, to within one utterance at any time;
            a speaker's utterances come in epochs of the speaker's own. With `shares`, within each
            set. With `shares` or `balance`, an epoch of the loader is as many utterances as
            without them, and no utterance is left out at its end.
        device: Where the batches go; None leaves them on the host.
        dtype: What the segments are converted to, on the device; None keeps the stored dtype, and
            gives float32 of a set of uint8. Of such a set, bytes travel to the device, or lie
            there, and are widened there; torch.uint8 delivers them as they are stored, to be
            widened by `shardprep.dequantise`.
        placement: Where the split lies. "host" reads the mapped shards. "device" loads the split
            into the memory of `device` once, and takes the same segments from there. "auto" means
            "device" if the split takes at most `shardprep.load.on_device.SHARE` of the free memory
            of a CUDA device, otherwise "host".
        prefetch: Batches that a thread prepares ahead, across the ends of epochs; with 0, each is
            prepared when it is due.
        verify_reads: Whether the crc32 of an utterance is checked before its segments are used:
            "never", "once" in this process, or "always". A split that goes to the device is always
            checked while it is loaded.
        on_corrupt: What happens at a damaged utterance: "raise" an error, or "skip" it. With
            "skip", the next undamaged utterance of this rank's part of the batch comes twice, so
            that batches keep their size and ranks stay in step.
        max_corrupt: Most damaged utterances that "skip" skips on this rank. One more is an error,
            and so is a batch in which every utterance is damaged.

    Attributes:
        placement: "host" or "device"; what "auto" chose.
        replaced: Segments delivered so far in place of those of damaged utterances.

    Yields:
        Dicts of tensors: mel (B, T, F) and label (B,) int64, both on `device`, and length (B,)
        int64, always on the host: how many frames of each segment are not padding. With dtype
        torch.uint8 also minimum and step (B,) float32, on `device`; padding of mel is then 0.

    Raises:
        ValueError: An argument is out of range; or the split is smaller than one global batch and
            drop_last is on; or on_corrupt is "skip" and verify_reads "never"; or dtype is of whole
            numbers, save torch.uint8 for a set of uint8. What depends on a world size that is not
            given is checked when an epoch begins.
        StorageError: The split comes from a store, and the cache has less room than the order
            needs at a time.
        CorruptShardError: A split that goes to the device is damaged. While iterating: a shard
            cannot be read, or an utterance is damaged.
        ShardprepError: When an epoch begins: RANK and WORLD_SIZE cannot be right.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        segment_frames: int = 128,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        pad_value: float = -20.0,
        order: Order = "global",
        lanes: int = 8,
        window_shards: int = 4,
        shares: Sequence[float | Rational] | None = None,
        balance: Balance | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        placement: Placement = "auto",
        prefetch: int = 2,
        verify_reads: VerifyReads = "never",
        on_corrupt: OnCorrupt = "raise",
        max_corrupt: int = 100,
    ) -> None:
        if prefetch < 0:
            raise ValueError(f"prefetch {prefetch}: must not be negative")
        if placement not in ("auto", "host", "device"):
            raise ValueError(f"placement {placement!r}: must be 'auto', 'host' or 'device'")
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype {dtype!r}: must be a torch.dtype, such as torch.uint8")
        if dtype is not None and not dtype.is_floating_point:
            if dtype != torch.uint8:
                raise ValueError(f"dtype {dtype}: must be a type of floats, or torch.uint8")
            if not split.is_quantised:
                raise ValueError(
                    f"dtype {dtype}: split {split.name} stores {split.stored_dtype}; only a set "
                    "that was built with --dtype uint8 holds bytes"
                )
        self._sampling = Sampling(
            batch_size=batch_size,
            segment_frames=segment_frames,
            seed=seed,
            shuffle=shuffle,
            drop_last=drop_last,
            order=order,
            lanes=lanes,
            window_shards=window_shards,
            shares=shares,
            balance=balance,
        )
        self._part = Part(rank, world_size)
        check_split(split, self._sampling, world_size or 1)
        self.split = split
        self.replaced = 0
        self._device = torch.device("cpu" if device is None else device)
        self._plan: BatchPlan | None = None
        self._position = Position()
        # The global batch of a loaded state, by which the windowed order counts.
        self._loaded_batch: int | None = None
        self._running: Iteration | None = None
        if world_size is not None:
            self._plan_now()
        if placement == "auto":
            placement = "device" if fits(split, self._device) else "host"
        self.placement = placement
        self._guard = ReadGuard(split, verify_reads, on_corrupt, max_corrupt)
        prefetch = operator.index(prefetch)
        self._maker = BatchMaker(
            split,
            self._guard,
            segment_frames=self._sampling.segment_frames,
            pad_value=pad_value,
            device=self._device,
            dtype=dtype,
            # Those that are ready, at the end of an epoch one more, and two that are used.
            keep=prefetch + 3,
        )
        self._epochs: EpochsAhead[Made] = EpochsAhead(self._maker.prepare, prefetch)
        self._load_resident()

    def __len__(self) -> int:
        """Batches of a whole epoch, the same on every rank."""
        return len(self._plan_now())

    @property
    def epoch(self) -> int:
        """The epoch that is read, or after its end the next one."""
        return self._position.epoch

    @property
    def damaged(self) -> dict[str, CorruptShardError]:
        """Damaged utterances that this rank found so far: key to what is wrong."""
        return {error.key or "": error for error in list(self._guard.damaged.values())}

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration read an epoch, from its begin.

        A place within this epoch that was loaded stays.

        Raises:
            ShardprepError: accelerate would divide the batches of a rank once more.
        """
        refuse_second_division(self, self._part)
        self._position.ask(operator.index(epoch))
        self._epochs.expect(self._position.will_begin_at)

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, the same on every rank.

        After the last batch of an epoch, it stands at the begin of the next one. The position
        counts the utterances of all ranks, so that a run can continue at another world size.

        Raises:
            ShardprepError: The workers of a DataLoader read, and their batches are on their way.
                In these workers, for a StatefulDataLoader, it works.
        """
        state = {**self._position.state(), **self._identity()}
        if self._sampling.counts_batches:
            state["global_batch"] = self._plan_now().global_batch
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where a loader stood when its `state_dict` was taken; ends a running iteration.

        Raises:
            ShardprepError: The state belongs to other data, another seed or another order, or to
                another worker of a DataLoader.
        """
        # Older states, from when there was one order, do not name the order.
        check_same({"order": "global", **state}, self._identity())
        batch = state.get("global_batch") if self._sampling.counts_batches else None
        if batch is not None:
            check_same({"global_batch": batch}, {"global_batch": self._plan_now().global_batch})
        self._position.load(state)
        self._end_running()
        self._epochs.expect(self._position.will_begin_at)
        self._loaded_batch = batch

    def close(self) -> None:
        """End a running iteration, and the thread that prepares batches.

        Without it, the thread ends with the loader. A later iteration starts another one.
        """
        self._end_running()
        self._epochs.close()

    def _identity(self) -> dict[str, Any]:
        """What a state must agree on with the loader that loads it."""
        split = {"split": self.split.name, "fingerprint": self.split.fingerprint}
        return {**self._sampling.identity(), **split}

    def _plan_now(self) -> BatchPlan:
        """The plan for the world at this moment."""
        world = self._part.world()
        if self._plan is None or self._plan.world != world:
            self._plan = BatchPlan(self.split, self._sampling, world)
        return self._plan

    def __iter__(self) -> Iterator[Batch]:
        plan = self._plan_now()
        refuse_second_division(self, self._part)
        if self._loaded_batch is not None and (
            self._position.inside_an_epoch or self._sampling.is_endless
        ):
            check_same({"global_batch": self._loaded_batch}, {"global_batch": plan.global_batch})
        if this_worker() is not None and (self._device.type != "cpu" or self.placement != "host"):
            raise ShardprepError(
                f"device {self._device}, placement {self.placement}: workers of a DataLoader give "
                "batches on the host only",
                key="device",
                remedy="Leave out device and placement, and move each batch in the training loop; "
                "or read without workers (num_workers=0): a thread prepares the batches.",
            )
        self._load_resident()
        self._end_running()
        self._running = running = Iteration()
        return self._batches(plan, self._position.begin(plan.end, plan.global_batch), running)

    def _load_resident(self) -> None:
        if self.placement == "device":
            self._maker.load_resident()

    def __getstate__(self) -> dict[str, Any]:
        # What belongs to this process stays here.
        return {**self.__dict__, "_plan": None, "_running": None}

    def _end_running(self) -> None:
        if self._running is not None:
            self._running.end()
        self._running = None

    def _batches(self, plan: BatchPlan, stretch: Stretch, running: Iteration) -> Iterator[Batch]:
        """The batches of an iteration; the loader moves with them until the iteration is ended."""
        if running.is_over():
            return
        if self._sampling.order == "global" and self._maker.resident is None:
            plan.read_ahead.warm()
        upcoming = partial(self._position.following, stretch, plan.end, plan.global_batch)
        ready = self._epochs.read(plan, stretch, upcoming)
        running.reads(ready)
        first = True
        with contextlib.closing(ready):
            for made in ready:
                if first:
                    self._position.give_first_batch(stretch)
                    first = False
                self._position.move(stretch, made.following, plan.end)
                self.replaced += made.replaced
                yield self._maker.deliver(made)
                if running.is_over():
                    return
        self._position.finish()
