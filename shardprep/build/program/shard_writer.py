"""Shards from a Python program, which adds one utterance after the other.

What is added goes to a spool in the work folder, and is packed at the end as a build packs a data
set. So a program that was killed repeats its calls, and equal calls give equal bytes.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from shardprep.build.options import BuildOptions
from shardprep.build.program.arguments import (
    as_array,
    check_speaker,
    checked_features,
    checked_n_mels,
)
from shardprep.build.program.finished_set import FinishedSet
from shardprep.build.program.new_set import NewSet, Place
from shardprep.build.report import BuildReport
from shardprep.build.shard import as_spooled
from shardprep.build.work_folder import FolderWork
from shardprep.errors import BuildError, SourceError
from shardprep.format.manifest import DType
from shardprep.source.features import Expected, check_shape, finite
from shardprep.source.metadata import MOST_SHOWN
from shardprep.source.paths import check_key
from shardprep.source.spool import Spooled
from shardprep.storage.remote import Remote, locate


class ShardWriter:
    """Packs the matrices that a program adds into a shard set.

        with shardprep.ShardWriter("shards/", n_mels=80) as writer:
            for key, speaker, audio in recordings:
                if not writer.keep(key):
                    writer.add(key, log_mels(audio), speaker=speaker)

    Nothing is published before `close`, which the end of the `with` block calls; an exception in
    the block publishes nothing. If the program was killed, run it again: its calls give the same
    bytes, and `keep` spares it the features that an earlier run has spooled. The spool takes as
    much room as the set (of uint8 four times as much), until the set is complete.

    If the folder holds a finished set, the calls are compared with it, and nothing is written. A
    BuildError says what differs, unless `overwrite` is given.

    Args:
        path: Folder for the shards, made if necessary.
        n_mels: Mel bins F of every matrix; any other features will do, too.
        dtype: Element type to store, "float16", "float32" or "uint8"; see `BuildOptions`.
        codec: "none" or "zstd".
        level: zstd level, 1 to 22; None for 3.
        samples_per_shard: Most utterances in a shard.
        val_fraction: Share of each speaker's utterances for the split val, in [0, 1).
        seed: Seed of the split and of the order.
        overwrite: Whether to replace a finished set.
        workers: Number of processes that pack; 0 for the number of cores.
        features: How the features were made, for the manifest: texts, numbers, true, false, None.

    Raises:
        BuildError: An option is wrong, another build or writer is running there, or the place
            holds something else.
        StorageError: The disk refused.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        n_mels: int = 80,
        *,
        dtype: DType = "float16",
        codec: Literal["none", "zstd"] = "none",
        level: int | None = None,
        samples_per_shard: int = 1000,
        val_fraction: float = 0.1,
        seed: int = 0,
        overwrite: bool = False,
        workers: int = 0,
        features: Mapping[str, str | int | float | bool | None] | None = None,
    ) -> None:
        self._options = BuildOptions(
            dtype=dtype,
            codec=codec,
            level=level,
            samples_per_shard=samples_per_shard,
            val_fraction=val_fraction,
            seed=seed,
            overwrite=overwrite,
            workers=workers,
        )
        target = locate(path)
        if isinstance(target, Remote):
            raise BuildError(
                "a ShardWriter writes to a folder of this machine",
                file=target,
                remedy="Name a folder, and copy the finished set to the URL.",
            )
        # The program may change its current folder before it adds or closes.
        target = target.absolute()
        self._n_mels = checked_n_mels(n_mels)
        self._features = checked_features(features)
        self._added: dict[str, Spooled] = {}
        self._report: BuildReport | None = None
        self._process, self._lock = os.getpid(), threading.Lock()
        self._held = contextlib.ExitStack()
        with contextlib.ExitStack() as held:
            work = held.enter_context(FolderWork.claim(target, overwrite))
            self._place: Place
            if work is None:
                self._place = FinishedSet(target, self._n_mels, self._options, self._features)
            else:
                self._place = NewSet(work, self._n_mels, self._options)
            held.callback(self._place.close)
            self._held = held.pop_all()

    def add(
        self,
        key: str,
        matrix: Any,
        speaker: str | None = None,
        split: Literal["train", "val", "test"] | None = None,
    ) -> None:
        """Add an utterance.

        Args:
            key: Names the utterance; slashes make folders in the tar, dots are refused.
            matrix: Its features (T, F): a NumPy array, a PyTorch tensor or nested lists of
                floating-point numbers.
            speaker: Speaker name; None where unknown, which needs the split test.
            split: "train", "val" or "test". None is test without a speaker; with a speaker, the
                utterance goes to train or val, by `val_fraction`.

        Raises:
            SourceError: The utterance cannot be packed. The writer goes on without it.
            BuildError: The writer is closed, or the finished set in its place is another one.
            StorageError: The disk refused.
        """
        with self._lock:
            self._check_open()
            try:
                self._check_new(check_key(key))
                check_speaker(speaker, split)
                # Texts of NumPy are of a class of their own.
                key, speaker = str(key), None if speaker is None else str(speaker)
                stored = self._spooled(matrix)
            except ValueError as fault:
                raise SourceError(str(fault), key=str(key)[:MOST_SHOWN]) from None
            split = "test" if speaker is None else split
            self._added[key] = self._place.take(key, stored, speaker, split)

    def keep(self, key: str) -> bool:
        """Count an utterance as added that an earlier run of the program has added, if it has.

        Its matrix, speaker and split are those of the earlier run.

        Returns:
            False if there is no such utterance, or what is stored of it is damaged: add it.

        Raises:
            SourceError: This run has added the utterance already.
            BuildError: The writer is closed.
            StorageError: The disk refused.
        """
        with self._lock:
            self._check_open()
            try:
                self._check_new(key)
            except ValueError as fault:
                raise SourceError(str(fault), key=key) from None
            if (record := self._place.keep(key)) is not None:
                self._added[key] = record
            return record is not None

    def close(self) -> BuildReport:
        """Pack what was added and publish the set; a second call gives the same report.

        Raises:
            SourceError: Nothing was added.
            BuildError: The finished set in the folder is another one, or a worker died.
            StorageError: The disk failed. Run the program again; finished shards are kept.
        """
        with self._lock:
            if self._report is not None:
                return self._report
            self._check_open()
            began = time.monotonic()
            with self._held:
                if not self._added:
                    raise SourceError("no utterance was added")
                source = self._place.source(self._added, self._features)
                report = self._place.finish(source, list(self._added.values()))
            report.seconds = time.monotonic() - began
            self._report = report
            return report

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            # The spool stays for the next run.
            self._held.close()

    def _check_open(self) -> None:
        if self._process != os.getpid():
            raise BuildError("a ShardWriter belongs to the process that made it")
        if self._place.closed:
            raise BuildError("the ShardWriter is closed", remedy="Make a new one.")

    def _check_new(self, key: str) -> None:
        if key in self._added:
            raise ValueError("is added a second time; each utterance needs a key of its own")

    def _spooled(self, matrix: Any) -> NDArray[np.floating]:
        """A matrix as the spool has it. ValueError if the shards cannot store it."""
        array = as_array(matrix)
        check_shape(array.shape, Expected(self._n_mels, 0, "frames"), "add matrix")
        if not array.size:
            raise ValueError(f"has shape {array.shape}, expected numbers")
        try:
            return as_spooled(finite(array), self._options.dtype)
        except ValueError as fault:
            raise ValueError(str(fault).replace("--dtype float32", 'dtype="float32"')) from None
