"""Load a set by every call in the table of docs/readers.md, and compare.

    python load_dataset.py RELEASE

The current folder has `shards/` and `folder/shards/`. Each call is tried whole and streaming, with
one process and with two.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import Any

import datasets
import numpy as np
from torch.utils.data import DataLoader

import shardprep
from tests.readers.read_page import PAGE, compare

NAMES = {"validation": "val"}


def calls() -> list[str]:
    """The calls in the table of the page."""
    return re.findall(r"^\| `(load_dataset\(.*?\))` \|", PAGE.read_text(), re.MULTILINE)


def read(rows: Iterable[dict[str, Any]], shard_set: shardprep.ShardSet) -> Any:
    """Key, label and matrix of each row, and whether its JSON says the same."""
    dtype = shard_set.manifest.numpy_dtype
    for row in rows:
        (column,) = (name for name in row if name.startswith("mel."))
        mel = np.asarray(row[column], dtype)
        if shard_set.manifest.is_quantised:
            step, minimum = (float(row["json"][name]) for name in ("step", "minimum"))
            mel = mel.astype("float32") * step + minimum
        named = shard_set.speakers[row["cls"]] if row["cls"] >= 0 else ""
        assert (row["json"]["speaker"], row["json"]["frames"]) == (named, len(mel))
        yield row["__key__"], row["cls"], mel


def try_call(call: str, shard_set: shardprep.ShardSet, **options: Any) -> None:
    """Load by one call, and compare every split."""
    found = eval(f"{call[:-1]}, **options)", {**vars(datasets), "options": options})
    one = "shards/*.tar" in call
    if not one and "data_files" not in call:
        assert {NAMES.get(name, name) for name in found} == set(shard_set.splits)
    for name, rows in found.items():
        splits = list(shard_set.values()) if one else [shard_set[NAMES.get(name, name)]]
        compare(list(read(rows, shard_set)), *splits)
        if options.get("streaming"):
            loader = DataLoader(rows, batch_size=None, num_workers=2)
            compare(list(read(loader, shard_set)), *splits)


def main(release: str) -> None:
    """Try every call."""
    assert datasets.__version__.startswith(f"{release}."), datasets.__version__
    datasets.disable_progress_bars()
    shard_set = shardprep.open_shards("shards/")
    assert len(calls()) == 5
    for call in calls():
        for options in ({}, {"num_proc": 2}, {"streaming": True}):
            print(call, options, flush=True)
            try_call(call, shard_set, **options)


if __name__ == "__main__":
    main(*sys.argv[1:])
