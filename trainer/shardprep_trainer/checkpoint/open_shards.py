"""The shards that a configuration names, opened."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shardprep import OpenShards, ShardCache, locate, open_shards
from shardprep_trainer.config.fields import DataConfig


def open_shards_of(data: DataConfig, paths: Sequence[str] = ()) -> OpenShards:
    """Open the shards of a run; shards behind a URL are read through the run's cache.

    Args:
        data: Names the shards and the cache.
        paths: Other folders or URLs to open in place of `data.shards`, to be read as one set.

    Raises:
        ShardprepError: The shards cannot be read.
    """
    places = [locate(path) for path in paths or data.places]
    cache = None
    if not all(isinstance(place, Path) for place in places):
        budget = None if data.cache_gb is None else int(data.cache_gb * 1e9)
        cache = ShardCache(data.cache_folder, budget, patience=data.patience_seconds)
    return open_shards(places, cache)
