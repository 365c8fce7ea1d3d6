"""The sets of `scripts.bench_remote`, on the disk and in a store, and how it reads them."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import shardprep
from scripts.servers.object_store import ObjectStore
from scripts.synthetic.noise import make_noise

LARGE, SMALL = (16_000, 1000), (4_000, 20)
WINDOWED: dict[str, Any] = {"order": "windowed", "batch_size": 32, "drop_last": False}
Result = dict[str, Any]


class Bench:
    """The store, the sets and the folder for temporary files."""

    def __init__(self, folder: Path, store: ObjectStore, scale: float, rounds: int) -> None:
        self.folder, self.store, self.rounds = folder, store, rounds
        self.scale = scale
        self._made: set[str] = set()

    def set(self, name: str, size: tuple[int, int]) -> tuple[Path, str]:
        """A set on the disk and in the store: its folder, and its URL."""
        shards, url = self.folder / name, self.store.url(name)
        if name not in self._made:
            self._made.add(name)
            utterances = max(200, int(size[0] * self.scale))
            make_noise(self.folder / f"{name}-source", utterances)
            per_shard = max(2, int(size[1] * self.scale))
            options = shardprep.BuildOptions(samples_per_shard=per_shard, val_fraction=0.02)
            shardprep.build_shards(self.folder / f"{name}-source", shards, options)
            for path in shards.iterdir():
                (shardprep.locate(url) / path.name).write(path.read_bytes())
        return shards, url

    def cache(self, name: str = "cache", *, empty: bool = True) -> Path:
        """A folder for a cache."""
        folder = self.folder / name
        if empty:
            shutil.rmtree(folder, ignore_errors=True)
        return folder


def shards_of(folder: Path) -> list[Path]:
    """The shards of the split train."""
    return sorted(folder.glob("train-*.tar"))


def segments(place: str | Path, cache: shardprep.ShardCache | None, **options: Any) -> list[str]:
    """A digest of every batch of an epoch."""
    split = shardprep.open_shards(place, cache)["train"]
    loader = shardprep.SegmentLoader(split, **{**WINDOWED, **options})
    return [hashlib.sha256(batch["mel"].numpy()).hexdigest() for batch in loader]
