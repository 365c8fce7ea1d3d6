"""The shards that a configuration names, opened."""

from __future__ import annotations

from pathlib import Path

from shardprep import ShardCache, ShardSet, locate, open_shards
from shardprep_trainer.config.fields import DataConfig


def open_shards_of(data: DataConfig, path: str | None = None) -> ShardSet:
    """Open the shards of a run; shards behind a URL are read through the run's cache.

    Args:
        data: Names the shards and the cache.
        path: Another folder or URL to open in place of `data.shards`.

    Raises:
        ShardprepError: The shards cannot be read.
    """
    place = locate(path or data.shards)
    cache = None
    if not isinstance(place, Path):
        budget = None if data.cache_gb is None else int(data.cache_gb * 1e9)
        cache = ShardCache(data.cache_folder, budget, patience=data.patience_seconds)
    return open_shards(place, cache)
