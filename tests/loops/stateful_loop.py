"""torchdata over a loader: `stateful_loop.py SHARDS OUT ACT ...`, in one process or more.

For every loop that torchdata offers: three epochs, and the same again, interrupted in the middle
of the second by a new loop that loads the state of the old one. ACT is not used.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from itertools import islice
from typing import Any

from torchdata import nodes
from torchdata.stateful_dataloader import StatefulDataLoader

from tests.loops.recorded import Record, each_act, loader, rank

EPOCHS = 3
LOOPS: dict[str, Callable[[Any], Any]] = {
    "stateful": lambda own: StatefulDataLoader(own, batch_size=None),
    "stateful-workers": lambda own: StatefulDataLoader(own, batch_size=None, num_workers=2),
    "stateful-persistent": lambda own: StatefulDataLoader(
        own, batch_size=None, num_workers=2, persistent_workers=True
    ),
    "nodes": lambda own: nodes.Loader(nodes.IterableWrapper(own)),
    "nodes-ahead": lambda own: nodes.Loader(nodes.Prefetcher(nodes.IterableWrapper(own), 2)),
}


def train(shards: str, out: str, _: str) -> None:
    for name, wrap in LOOPS.items():
        record = Record(out, name, rank())
        batches = wrap(loader(shards))
        for _ in range(EPOCHS):
            for batch in batches:
                record.add(batch)
        record = Record(out, f"{name}-resumed", rank())
        batches = wrap(loader(shards))
        for batch in batches:
            record.add(batch)
        half = len(loader(shards)) // 2
        for batch in islice(batches, half):
            record.add(batch)
        state = pickle.dumps(batches.state_dict())
        batches = wrap(loader(shards))
        batches.load_state_dict(pickle.loads(state))
        for _ in range(2):
            for batch in batches:
                record.add(batch)


if __name__ == "__main__":
    each_act(train)
