"""`shardprep inspect DST --parquet FILE`: the index of a set as a table, for DuckDB and polars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from shardprep.errors import needs
from shardprep.format.index import NO_LABEL
from shardprep.format.quantised import Scale
from shardprep.read.shard_set import ShardSet
from shardprep.read.split import Split
from shardprep.storage.local import publish

# Rows that are in memory as a table at a time.
_ROWS = 1 << 16


def write_parquet(shard_set: ShardSet, path: Path) -> int:
    """Write a Parquet file with one row an utterance, in the order of the index.

    Columns: key, split, index (position in the split), label (-1 where unknown), speaker (""
    where unknown), frames, shard (file name), offset and nbytes (of the matrix in the shard); of
    element type uint8 also minimum and step.

    Args:
        shard_set: The set.
        path: The file; it appears complete, and replaces one that is there.

    Returns:
        The number of rows.

    Raises:
        MissingExtraError: pyarrow is not installed.
        StorageError: The file cannot be written.
    """
    with needs("parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq
    is_quantised = shard_set.manifest.is_quantised
    schema = pa.schema(
        {
            "key": pa.string(),
            "split": pa.string(),
            "index": pa.int64(),
            "label": pa.int32(),
            "speaker": pa.string(),
            "frames": pa.int64(),
            "shard": pa.string(),
            "offset": pa.int64(),
            "nbytes": pa.int64(),
            **(dict.fromkeys(Scale._fields, pa.float32()) if is_quantised else {}),
        }
    )
    splits = [shard_set[name] for name in shard_set.splits]
    with publish(path) as file, pq.ParquetWriter(file, schema) as writer:
        for split in splits:
            for begin in range(0, len(split), _ROWS):
                end = min(begin + _ROWS, len(split))
                columns = _columns(pa, shard_set, split, begin, end)
                writer.write_table(pa.Table.from_pydict(columns, schema))
    return sum(map(len, splits))


def _columns(pa: Any, shard_set: ShardSet, split: Split, begin: int, end: int) -> dict[str, Any]:
    """The columns of some rows of a split."""
    rows = split.locations[begin:end]
    count = end - begin
    speakers = [*shard_set.speakers, ""]
    labels = split.labels[begin:end]
    unknown = np.int32(len(speakers) - 1)
    shards = [shard.file for shard in shard_set.manifest.splits[split.name].shards]

    def named(numbers: Any, names: list[str]) -> Any:
        numbered = pa.DictionaryArray.from_arrays(pa.array(numbers, pa.int32()), pa.array(names))
        return numbered.cast(pa.string())

    return {
        "key": pa.array(rows["key"]).cast(pa.string()),
        "split": named(np.zeros(count, np.int32), [split.name]),
        "index": np.arange(begin, end),
        "label": labels,
        "speaker": named(np.where(labels == NO_LABEL, unknown, labels), speakers),
        "frames": rows["frames"].astype(np.int64),
        "shard": named(rows["shard"].astype(np.int32), shards),
        "offset": rows["offset"].astype(np.int64),
        "nbytes": rows["nbytes"].astype(np.int64),
        **({name: rows[name] for name in Scale._fields} if split.is_quantised else {}),
    }
