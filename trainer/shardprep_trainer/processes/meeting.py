"""How the processes of a launch find one another, each time that they are started."""

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
_TOKENS = "trainer/tokens"
_POLL_SECONDS = 0.02
# The process group counts its time-out in milliseconds, in 32 bits.
_LONGEST_SECONDS = 1e6


def join_processes(run: Path, *, trackers: Sequence[str], hang_seconds: float) -> Accelerator:
    """Meet the other processes of the launch.

    Args:
        run: The run folder, which gets the files of the trackers.
        trackers: Trackers of accelerate to log to.
        hang_seconds: `train.hang_seconds`, also the longest time that the meeting may take [s].

    Raises:
        ConfigError: The flags of the launch do not suit the device, or accelerate sees fewer
            processes than were started: each would train, and write, on its own.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    watchdog = Watchdog(hang_seconds, rank=int(os.environ.get("RANK", "0")))
    watchdog.enter(MEETING, 0)
    try:
        with watchdog:
            accelerator = Accelerator(
                # Without this, accelerate does not join processes that have only CPUs.
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
    """Options for the process group that accelerate makes.

    Args:
        hang_seconds: `train.hang_seconds`. The group's own time-out is longer, as the watchdog
            can say more; it is PyTorch's default if this is 0 [s].
    """
    seconds = min(2 * hang_seconds, _LONGEST_SECONDS) + 300 if hang_seconds else 1800
    return InitProcessGroupKwargs(init_method=f"{_SCHEME}://", timeout=timedelta(seconds=seconds))


def meeting_place() -> Store | None:
    """The store through which the processes have met; None for a single process."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    return distributed.distributed_c10d._get_default_store()


@contextlib.contextmanager
def parting() -> Iterator[None]:
    """Leave the process group at the end, also after an error: gloo aborts a process otherwise."""
    try:
        yield
    finally:
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()


def _meet(url: str, **options: Any) -> Iterator[tuple[Store, int, int]]:
    # When torchrun restarts a group it keeps the store, with the addresses of the dead processes,
    # for which the new ones would wait for ever. So each start uses names with a prefix of its own.
    # torchrun's number of restarts cannot be the prefix: each machine counts for itself.
    for store, rank, world_size in rendezvous(f"env{url.removeprefix(_SCHEME)}", **options):
        yield PrefixStore(_agree_on_prefix(store, rank, world_size), store), rank, world_size


def _agree_on_prefix(store: Store, rank: int, world_size: int) -> str:
    """A prefix that all processes of this start have, and no process of an earlier start had.

    Each process writes a token of its own. Process 0 publishes all tokens, its own first, which is
    the prefix. Another process accepts a list that contains its token. Process 0 repeats this until
    all have accepted, as the tokens that it found first may be those of dead processes.
    """
    own = uuid.uuid4().hex
    written = [f"trainer/own/{other}" for other in range(world_size)]
    accepted = [f"trainer/accepted/{other}" for other in range(world_size)]
    store.set(written[rank], own)
    while True:
        if rank == 0:
            tokens = [token.decode() for token in store.multi_get(written)]
            store.set(_TOKENS, " ".join(tokens))
            store.set(accepted[0], own)
            if store.check(accepted) and set(store.multi_get(accepted)) == {own.encode()}:
                return own
        else:
            tokens = store.get(_TOKENS).decode().split()
            # A list of an earlier start may be shorter.
            if tokens[rank:][:1] == [own]:
                store.set(accepted[rank], tokens[0])
                return tokens[0]
        time.sleep(_POLL_SECONDS)


register_rendezvous_handler(_SCHEME, _meet)  # type: ignore[no-untyped-call]
