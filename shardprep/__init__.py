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
    from shardprep.cache import ShardCache
    from shardprep.errors import (
        BuildError,
        CorruptShardError,
        FormatError,
        ShardprepError,
        SourceError,
        StorageError,
    )
    from shardprep.format import Manifest
    from shardprep.loader import SegmentLoader
    from shardprep.options import BuildOptions
    from shardprep.reader import ShardSet, Split, open_shards
    from shardprep.remote import Remote, locate
    from shardprep.repair import RepairReport, repair_shards
    from shardprep.storage import publish
    from shardprep.streaming import stream
    from shardprep.utterances import UtteranceLoader
    from shardprep.verify import Fault, VerifyReport, verify_shards
    from shardprep.writer import BuildReport, build_shards

__version__ = "0.1.0"

# Loaded when first asked for, so that `import shardprep` costs nothing and needs no torch.
_HOMES = {
    "BuildError": "errors",
    "BuildOptions": "options",
    "BuildReport": "writer",
    "CorruptShardError": "errors",
    "Fault": "verify",
    "FormatError": "errors",
    "Manifest": "format",
    "Remote": "remote",
    "RepairReport": "repair",
    "SegmentLoader": "loader",
    "ShardCache": "cache",
    "ShardSet": "reader",
    "ShardprepError": "errors",
    "SourceError": "errors",
    "Split": "reader",
    "StorageError": "errors",
    "UtteranceLoader": "utterances",
    "VerifyReport": "verify",
    "build_shards": "writer",
    "locate": "remote",
    "open_shards": "reader",
    "publish": "storage",
    "repair_shards": "repair",
    "stream": "streaming",
    "verify_shards": "verify",
}

__all__ = [
    "BuildError",
    "BuildOptions",
    "BuildReport",
    "CorruptShardError",
    "Fault",
    "FormatError",
    "Manifest",
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
