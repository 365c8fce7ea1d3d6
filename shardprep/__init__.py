"""Pack folders of mel-spectrogram files into tar shards, and read them at the speed of memory.

import shardprep

if __name__ == "__main__":
    shardprep.build_shards("Dataset/", "shards/")
    train = shardprep.open_shards("shards/")["train"]
    for batch in shardprep.SegmentLoader(train, batch_size=32):
        ...
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardprep.build.options import BuildOptions
    from shardprep.build.writer import BuildReport, build_shards
    from shardprep.cache.shard_cache import ShardCache
    from shardprep.check.repair import RepairReport, repair_shards
    from shardprep.check.verify import Fault, VerifyReport, verify_shards
    from shardprep.errors import (
        BuildError,
        CorruptShardError,
        FormatError,
        MissingExtraError,
        ShardprepError,
        SourceError,
        StorageError,
    )
    from shardprep.format.manifest import Manifest
    from shardprep.load.segments import SegmentLoader
    from shardprep.load.utterances import UtteranceLoader
    from shardprep.read.shard_set import ShardSet, open_shards
    from shardprep.read.split import Split
    from shardprep.read.webdataset import stream
    from shardprep.storage.local import publish
    from shardprep.storage.remote import Remote, locate

__version__ = "0.1.0"

# Loaded when first asked for, so that `import shardprep` costs nothing and needs no torch.
_HOMES = {
    "BuildError": "errors",
    "BuildOptions": "build.options",
    "BuildReport": "build.writer",
    "CorruptShardError": "errors",
    "Fault": "check.verify",
    "FormatError": "errors",
    "Manifest": "format.manifest",
    "MissingExtraError": "errors",
    "Remote": "storage.remote",
    "RepairReport": "check.repair",
    "SegmentLoader": "load.segments",
    "ShardCache": "cache.shard_cache",
    "ShardSet": "read.shard_set",
    "ShardprepError": "errors",
    "SourceError": "errors",
    "Split": "read.split",
    "StorageError": "errors",
    "UtteranceLoader": "load.utterances",
    "VerifyReport": "check.verify",
    "build_shards": "build.writer",
    "locate": "storage.remote",
    "open_shards": "read.shard_set",
    "publish": "storage.local",
    "repair_shards": "check.repair",
    "stream": "read.webdataset",
    "verify_shards": "check.verify",
}

__all__ = [
    "BuildError",
    "BuildOptions",
    "BuildReport",
    "CorruptShardError",
    "Fault",
    "FormatError",
    "Manifest",
    "MissingExtraError",
    "Remote",
    "RepairReport",
    "SegmentLoader",
    "ShardCache",
    "ShardSet",
    "ShardprepError",
    "SourceError",
    "Split",
    "StorageError",
    "UtteranceLoader",
    "VerifyReport",
    "build_shards",
    "locate",
    "open_shards",
    "publish",
    "repair_shards",
    "stream",
    "verify_shards",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'shardprep' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"shardprep.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
