"""Python's collection of garbage, held while steps are taken.

It begins whenever enough objects have been made, in the midst of a step, and looks at every object
of PyTorch. A GPU runs out of launched work meanwhile, and with several processes all wait for the
one that collects. Instead they collect at the same steps, among the objects made since the start.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def garbage_held() -> Iterator[None]:
    """Collect only where `gc.collect` is called; what exists already is not looked at."""
    enabled, own = gc.isenabled(), gc.get_freeze_count() == 0
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        if own:
            gc.unfreeze()
        if enabled:
            gc.enable()
