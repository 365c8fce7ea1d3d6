"""How the processes of a launch find one another, every time that they are started."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from torch import distributed
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from shardprep_trainer.errors import ConfigError
from shardprep_trainer.processes.watchdog import MEETING, Watchdog

_SCHEME = "trainer"
_WORDS = "trainer/words"
_POLL_SECONDS = 0.02
# The process group counts milliseconds in 32 bits.
_LONGEST_SECONDS = 1e6


def join_processes(run: Path, *, trackers: Sequence[str], hang_seconds: float) -> Accelerator:
    """Meet the other processes of the launch.

    Args:
        run: The run folder, which gets the files of the trackers.
        trackers: Trackers of accelerate to log to.
        hang_seconds: Of the configuration; the meeting itself may take no longer [s].

    Raises:
        ConfigError: The flags of the launch do not suit the device, or not all processes can be
            met: each would train, and write, on its own.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    watchdog = Watchdog(hang_seconds, rank=int(os.environ.get("RANK", "0")))
    watchdog.enter(MEETING, 0)
    try:
        with watchdog:
            accelerator = Accelerator(
                # Unless told so, accelerate does not join processes that have nothing but CPUs.
                cpu=started > 1 and not torch.accelerator.is_available(),
                log_with=list(trackers) or None,
                # Event files go into the run folder itself: TensorBoard calls the run by its name.
                project_config=ProjectConfiguration(str(run), logging_dir=str(run.parent)),
                kwargs_handlers=[group_options(hang_seconds)],
            )
    except ValueError as error:
        raise ConfigError(f"accelerate refuses these launch flags: {error}") from error
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # accelerate would train in float32 and call it fp16.
        raise ConfigError(
            "accelerate launch --mixed_precision: found fp16, but the CPU computes bf16 or no"
        )
    if accelerator.num_processes != started:
        raise ConfigError(
            f"the launcher started {started} processes, but accelerate sees "
            f"{accelerator.num_processes}; start fewer, or on CPUs with `accelerate launch --cpu`"
        )
    return accelerator


def group_options(hang_seconds: float) -> InitProcessGroupKwargs:
    """How accelerate is to make the process group.

    Args:
        hang_seconds: Of the configuration; the watchdog, which knows more, is to speak before the
            group's own time-out does. Without one, 0, the latter is PyTorch's [s].
    """
    seconds = min(2 * hang_seconds, _LONGEST_SECONDS) + 300 if hang_seconds else 1800
    return InitProcessGroupKwargs(init_method=f"{_SCHEME}://", timeout=timedelta(seconds=seconds))


def meeting_place() -> Store | None:
    """The store through which the processes of the launch have met; None for one on its own."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    return distributed.distributed_c10d._get_default_store()


@contextlib.contextmanager
def parting() -> Iterator[None]:
    """Leave the others at the end, whatever comes: gloo aborts a process that does not."""
    try:
        yield
    finally:
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()


def _meet(url: str, **options: Any) -> Iterator[tuple[Store, int, int]]:
    # torchrun keeps its store when it restarts a group, and in it the addresses of processes that
    # are dead: new ones that find those wait for them for ever. Its count of restarts is no help,
    # as each machine counts for itself.
    for store, rank, world_size in rendezvous(f"env{url.removeprefix(_SCHEME)}", **options):
        yield PrefixStore(_watchword(store, rank, world_size), store), rank, world_size


def _watchword(store: Store, rank: int, world_size: int) -> str:
    """A word that the processes of this start have in common, and those of an earlier one had not.

    Each writes a word of its own. Process 0 publishes them all, with its own as the one to use;
    the others believe what holds theirs, and say so. It looks for as long as one has not, for what
    it found first may be from a dead one.
    """
    own = uuid.uuid4().hex
    written = [f"trainer/own/{other}" for other in range(world_size)]
    believed = [f"trainer/believed/{other}" for other in range(world_size)]
    store.set(written[rank], own)
    while True:
        if rank == 0:
            words = [word.decode() for word in store.multi_get(written)]
            store.set(_WORDS, " ".join(words))
            store.set(believed[0], own)
            if store.check(believed) and set(store.multi_get(believed)) == {own.encode()}:
                return own
        else:
            words = store.get(_WORDS).decode().split()
            # What is left of an earlier start may be of another number of processes.
            if words[rank:][:1] == [own]:
                store.set(believed[rank], words[0])
                return words[0]
        time.sleep(_POLL_SECONDS)


register_rendezvous_handler(_SCHEME, _meet)  # type: ignore[no-untyped-call]
