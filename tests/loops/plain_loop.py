"""Loops of one's own, `plain_loop.py SHARDS OUT ACT ...`, started by torchrun or by themselves.

ACT is "plain"; or "prepare", over what Accelerator.prepare makes of the loader; or "dispatch" and
"shard", over what it makes of a DataLoader, which is refused where there are several processes.
"""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

import shardprep
from tests.loops.recorded import Record, each_act, loader, rank

EPOCHS = 3


def prepared(own: Any, act: str) -> Any:
    from accelerate import Accelerator, DataLoaderConfiguration

    if act == "prepare":
        return Accelerator(cpu=True).prepare(own)
    dispatch = DataLoaderConfiguration(dispatch_batches=act == "dispatch")
    accelerator = Accelerator(cpu=True, dataloader_config=dispatch)
    return accelerator.prepare(DataLoader(own, batch_size=None if act == "dispatch" else 1))


def train(shards: str, out: str, act: str) -> None:
    batches: Any = loader(shards)
    record = Record(out, act, rank())
    if act != "plain":
        batches = prepared(batches, act)
    try:
        for _ in range(EPOCHS):
            for batch in batches:
                record.add(batch)
    except shardprep.ShardprepError as error:
        record.path.write_text(f"refused: {error}")


if __name__ == "__main__":
    each_act(train)
