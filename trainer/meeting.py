"""How the processes of a launch find one another, every time that they are started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from accelerate.utils import InitProcessGroupKwargs
from torch import distributed
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

_SCHEME = "trainer"
# The process group counts milliseconds in 32 bits.
_LONGEST_SECONDS = 1e6


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


def _meet(url: str, **options: Any) -> Iterator[tuple[Store, int, int]]:
    # torchrun keeps its store when it restarts a group, and in it the addresses of processes that
    # are dead: new ones that find those wait for them for ever.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    for store, rank, world_size in rendezvous("env://", **options):
        yield PrefixStore(f"attempt {attempt}", store), rank, world_size


register_rendezvous_handler(_SCHEME, _meet)  # type: ignore[no-untyped-call]
