"""The options of a build, checked as soon as they are given."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import Literal, get_args

from shardprep.audio.recipe import FeatureRecipe
from shardprep.errors import BuildError
from shardprep.format.limits import MAX_N_MELS
from shardprep.format.manifest import BuildRecord, CodecInfo, DType, Manifest

DEFAULT_ZSTD_LEVEL = 3
CHUNK_FRAMES = 64


@dataclass(frozen=True)
class BuildOptions:
    """How to build.

    Attributes:
        dtype: Element type to store; uint8 keeps 256 levels between the smallest and the largest
            value of each utterance.
        codec: "none", or "zstd" for shards that are about 8 % smaller but slower to read.
        level: zstd level, 1 to 22; None for 3. Only with the codec zstd.
        samples_per_shard: Most utterances in a shard.
        val_fraction: Share of each speaker's utterances for the split val, in [0, 1).
        val_speakers: Share of the speakers whose utterances are all for the split val, in [0, 1):
            speakers whom no training meets.
        seed: Seed of the split and of the order.
        workers: Number of processes; 0 for the number of cores. With Ray, most tasks at a time;
            0 for as many as the cluster has CPUs.
        on_error: "fail": a faulty utterance stops the build; "skip": it is left out and listed.
        overwrite: Whether to replace a finished set of other contents.
        dry_run: Read and check everything, write nothing. Faulty utterances do not stop it; the
            report lists them.
        follow_links: Whether files of the data set may be links out of it, as download caches make
            them. Only for a data set that you trust: a link can name any file of this machine.
        n_mels: Mel bins that a list of files must have; None for those of its first matrix.
        recipe: From recordings to log-mels; None for the homework's. Where the source is features,
            it is what they were made by, for the manifest.
        engine: "local" for processes on this machine, "ray" for tasks on a Ray cluster.
        address: Address of the cluster: "auto" or host:port; None starts Ray on this machine.
    """

    dtype: DType = "float16"
    codec: Literal["none", "zstd"] = "none"
    level: int | None = None
    samples_per_shard: int = 1000
    val_fraction: float = 0.1
    val_speakers: float = 0.0
    seed: int = 0
    workers: int = 0
    on_error: Literal["fail", "skip"] = "fail"
    overwrite: bool = False
    dry_run: bool = False
    follow_links: bool = False
    n_mels: int | None = None
    recipe: FeatureRecipe | None = None
    engine: Literal["local", "ray"] = "local"
    address: str | None = None

    def __post_init__(self) -> None:
        allowed = {
            "dtype": get_args(DType),
            "codec": ("none", "zstd"),
            "on_error": ("fail", "skip"),
            "engine": ("local", "ray"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise BuildError(f"is {getattr(self, name)!r}, expected one of {values}", key=name)
        for name in ("level", "samples_per_shard", "seed", "workers", "n_mels"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, numbers.Integral):
                raise BuildError(f"is {value!r:.60}, expected a whole number", key=name)
        for name in ("val_fraction", "val_speakers"):
            if not isinstance(value := getattr(self, name), numbers.Real):
                raise BuildError(f"is {value!r:.60}, expected a number", key=name)
        ranges = {
            "level": (self.level is None or 1 <= self.level <= 22, "1 to 22"),
            "samples_per_shard": (self.samples_per_shard >= 1, "at least 1"),
            "val_fraction": (0 <= self.val_fraction < 1, "0 or more, and less than 1"),
            "val_speakers": (0 <= self.val_speakers < 1, "0 or more, and less than 1"),
            "n_mels": (self.n_mels is None or 1 <= self.n_mels <= MAX_N_MELS, f"1 to {MAX_N_MELS}"),
            "workers": (self.workers >= 0, "0 or more"),
        }
        for name, (valid, expected) in ranges.items():
            if not valid:
                raise BuildError(f"is {getattr(self, name)}, expected {expected}", key=name)
        if self.level is not None and self.codec != "zstd":
            raise BuildError("is for the codec zstd only", key="level")
        if self.address is not None and self.engine != "ray":
            raise BuildError("is for the engine ray only", key="address")

    @property
    def codec_info(self) -> CodecInfo:
        """The codec as the manifest states it."""
        if self.codec == "none":
            return CodecInfo("none")
        return CodecInfo("zstd", int(self.level or DEFAULT_ZSTD_LEVEL), CHUNK_FRAMES)

    @property
    def record(self) -> BuildRecord:
        """The options that decide the bytes, as the manifest states them."""
        # The types must be those that a reader gets: the fingerprint differs between 0 and 0.0.
        return BuildRecord(
            int(self.seed),
            float(self.val_fraction),
            int(self.samples_per_shard),
            self.on_error,
            float(self.val_speakers) or None,
        )


def options_of(manifest: Manifest) -> BuildOptions:
    """The options of the build that made a set, if they decide its bytes; else the defaults."""
    build, codec = manifest.build or BuildOptions().record, manifest.codec
    return BuildOptions(
        dtype=manifest.dtype,
        codec=codec.name,
        level=codec.level,
        samples_per_shard=build.samples_per_shard,
        val_fraction=build.val_fraction,
        val_speakers=build.val_speakers or 0.0,
        seed=build.seed,
        on_error=build.on_error,
    )
