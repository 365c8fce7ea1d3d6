"""A split of one or several shard sets: whole utterances, and whole batches of segments.

The index says where every mel matrix lies, so nothing here parses a tar or a JSON file.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shardprep.errors import CRC_FAULT, REBUILD, CorruptShardError
from shardprep.format import codecs
from shardprep.format.index import Columns, index_dtype, load_columns
from shardprep.format.quantised import dequantise
from shardprep.read.files import Origin, map_shards
from shardprep.read.gather.contract import DamagedChunk, Gather
from shardprep.read.gather.places import Places
from shardprep.read.gather.plain import PlainGather
from shardprep.read.gather.widen import pad, widen
from shardprep.read.gather.zstd import ZstdGather
from shardprep.read.joined import joined_fingerprint, joined_rows, joined_speakers
from shardprep.read.shard_map import WantedShards
from shardprep.read.sidecars import load_index
from shardprep.storage.remote import Location, Remote


class Split:
    """A split of a shard set, in the order of its index; of several sets, one after another.

    Args:
        name: "train", "val" or "test".
        origins: The sets; see `shardprep.read.joined.check_alike`.

    Attributes:
        name: As given.
        n_mels: Mel bins F.
        dtype: Element type of what is read: float32 for a set of uint8, otherwise the stored one.
        stored_dtype: Element type of the stored matrices.
        minimum: Of a set of uint8, the value of a stored 0 (N,) float32; otherwise None.
        step: Of a set of uint8, the distance of two stored numbers (N,) float32; otherwise None.
        fingerprint: Fingerprint of the set, or of the sets together.
        set_sizes: Utterances from each of the sets, in their order; they add up to N.
        labels: Speaker numbers (N,) int32; -1 where unknown.
        frames: Lengths in mel frames (N,) int64.
        keys: Keys of the utterances (N,), strings.
    """

    def __init__(self, name: str, origins: Sequence[Origin]) -> None:
        self.name = name
        self._origins = tuple(origins)
        manifests = [origin.manifest for origin in origins]
        self.n_mels = manifests[0].n_mels
        self.dtype = manifests[0].read_dtype
        self.stored_dtype = manifests[0].numpy_dtype
        self._codec = manifests[0].codec
        self.fingerprint = joined_fingerprint([manifest.fingerprint for manifest in manifests])
        # Where each shard is from, and what the manifest says of it.
        self._shards = [(origin, shard) for origin in origins for shard in origin.shards(name)]
        self._map = map_shards(origins, name)
        ends = np.cumsum([len(origin.shards(name)) for origin in origins])
        indexes = [
            _open_index(origin, name, begins)
            for origin, begins in zip(origins, np.split(self._map.begins, ends), strict=False)
        ]
        self._rows, columns = indexes[0] if len(indexes) == 1 else self._join(indexes)
        self.set_sizes = tuple(len(rows) for rows, _ in indexes)
        self.labels, self.frames, self._begin, self.minimum, self.step = columns

    def _join(self, indexes: list[tuple[NDArray[Any], Columns]]) -> tuple[NDArray[Any], Columns]:
        """The indexes of several sets as one, with the labels of all their speakers."""
        _, labels = joined_speakers([origin.manifest.speakers for origin in self._origins])
        shards = [len(origin.shards(self.name)) for origin in self._origins]
        rows = joined_rows([rows for rows, _ in indexes], shards, labels)
        columns = [columns for _, columns in indexes]
        minimum, step = (_concatenate([own[at] for own in columns]) for at in (3, 4))
        return rows, Columns(
            rows["label"].copy(),
            np.concatenate([own.frames for own in columns]),
            np.concatenate([own.begin for own in columns]),
            minimum,
            step,
        )

    def __len__(self) -> int:
        return len(self._rows)

    def __reduce__(self) -> Any:
        # The other process opens the files itself. Pickled maps would send every byte.
        return type(self), (self.name, self._origins)

    def __repr__(self) -> str:
        return f"Split({self.name!r}, {len(self)} utterances, {int(self.frames.sum())} frames)"

    @property
    def locations(self) -> NDArray[Any]:
        """The index rows (N,): shard, offset, nbytes, frames, label, crc32, key; see FORMAT.md."""
        return self._rows

    @property
    def is_quantised(self) -> bool:
        """Whether the set is of element type uint8: each utterance has a minimum and a step."""
        return self.minimum is not None

    @functools.cached_property
    def keys(self) -> NDArray[np.str_]:
        """Keys of the utterances (N,), strings."""
        return np.char.decode(self._rows["key"], "utf-8")

    def read(self, index: int) -> NDArray[Any]:
        """One whole utterance; its crc32 is checked.

        Args:
            index: Position in the split.

        Returns:
            Matrix (frames, F) of `dtype`; a copy.

        Raises:
            IndexError: There is no such position.
            CorruptShardError: The stored bytes are damaged.
        """
        mel = self.read_stored(index)
        if self.minimum is None or self.step is None:
            return mel
        return dequantise(mel, self.minimum[index], self.step[index])

    def read_stored(self, index: int) -> NDArray[Any]:
        """`read` without widening: a matrix (frames, F) of `stored_dtype`; a copy."""
        if not 0 <= index < len(self):
            raise IndexError(f"utterance {index} of a split of {len(self)}")
        row = self._rows[index]
        begin = int(self._begin[index])
        with self._map.reading(np.array([row["shard"]], np.int64)):
            payload = self._map.bytes.data[begin : begin + int(row["nbytes"])]
            if zlib.crc32(payload) == row["crc32"]:
                return self._decode(index, payload)
        # Damaged in a cache: read again when the shard has come again.
        if not self._map.renew(int(row["shard"])):
            raise self.damaged(index)
        return self.read_stored(index)

    def _decode(self, index: int, payload: memoryview) -> NDArray[Any]:
        size = int(self.frames[index]) * self.n_mels * self.stored_dtype.itemsize
        try:
            mel = codecs.decode(payload, self._codec, size)
        except ValueError as error:
            raise self.damaged(index, f"the stored bytes cannot be decoded ({error})") from None
        if mel.shape != (self.frames[index], self.n_mels) or mel.dtype != self.stored_dtype:
            raise self.damaged(index, f"holds {mel.dtype} {mel.shape}, unlike the index")
        return mel

    def segments(
        self,
        indices: ArrayLike,
        starts: ArrayLike,
        length: int,
        pad_value: float = -20.0,
        out: NDArray[Any] | None = None,
    ) -> NDArray[Any]:
        """A batch of segments from the memory maps; no crc32 is checked (`intact` checks them).

        Args:
            indices: Positions in the split (B,).
            starts: First frame of each segment (B,), within its utterance.
            length: Frames T a segment.
            pad_value: Fills the frames of a segment after the end of its utterance.
            out: Buffer (B, T, F) of `dtype` to fill; a new buffer by default.

        Returns:
            Matrices (B, T, F) of `dtype`.

        Raises:
            IndexError: An index or a start is out of range.
            CorruptShardError: A compressed chunk is damaged.
        """
        if self.minimum is None or self.step is None:
            return self.stored_segments(indices, starts, length, pad_value, out)
        places = self.places(indices, starts, length)
        shape = (len(places.utterance), length, self.n_mels)
        mel, levels = _buffer(out, shape, self.dtype), np.empty(shape, self.stored_dtype)
        self.gather(places, pad_value, levels)
        widen(levels, self.minimum[places.utterance], self.step[places.utterance], mel)
        pad(mel, places.valid, pad_value)
        return mel

    def stored_segments(
        self,
        indices: ArrayLike,
        starts: ArrayLike,
        length: int,
        pad_value: float = -20.0,
        out: NDArray[Any] | None = None,
    ) -> NDArray[Any]:
        """`segments` without widening: matrices (B, T, F) of `stored_dtype`.

        Padding of a set of uint8 is 0: no byte stands for `pad_value`.
        """
        places = self.places(indices, starts, length)
        out = _buffer(out, (len(places.utterance), length, self.n_mels), self.stored_dtype)
        self.gather(places, pad_value, out)
        return out

    def places(self, indices: ArrayLike, starts: ArrayLike, length: int) -> Places:
        """Where segments lie, for `gather`; arguments and errors as those of `segments`."""
        index = np.asarray(indices, np.int64)
        start = np.asarray(starts, np.int64)
        if length < 1 or index.ndim != 1 or index.shape != start.shape:
            raise ValueError("segments needs indices (B,), starts (B,) and a positive length")
        self._check_range(index)
        frames = self.frames[index]
        if ((start < 0) | (start >= frames)).any():
            raise IndexError("a segment starts outside its utterance")
        rows, begin = self._rows, self._begin[index]
        end = begin + rows["nbytes"][index]
        valid = np.minimum(frames - start, length)
        return Places(index, rows["shard"][index], begin, end, frames, start, valid)

    def gather(self, places: Places, pad_value: float, out: NDArray[Any]) -> None:
        """Fill a buffer with segments, as `stored_segments` does.

        Args:
            places: Where they lie (B,).
            pad_value: Fills the padding, unless the set is of uint8.
            out: A contiguous buffer (B, T, F) of `stored_dtype`.
        """
        pad_value = 0 if self.is_quantised else pad_value
        index, shard, begin, end, frames, start, valid = places
        try:
            with self._map.reading(shard):
                self._gather(begin, end, frames, start, valid, pad_value, out)
        except DamagedChunk as error:
            what = f"a chunk cannot be inflated ({error})"
            raise self.damaged(int(index[error.row]), what) from None

    def intact(self, indices: ArrayLike) -> NDArray[np.bool_]:
        """Whether the stored bytes of utterances match their crc32.

        Args:
            indices: Positions in the split (B,).

        Returns:
            True for each undamaged utterance (B,).

        Raises:
            IndexError: There is no such position.
            CorruptShardError: A shard is missing or has another size.
        """
        index = np.asarray(indices, np.int64)
        self._check_range(index)
        begin = self._begin[index]
        end, memory = begin + self._rows["nbytes"][index], self._map.bytes.data
        spans = zip(begin.tolist(), end.tolist(), strict=True)
        shards = self._rows["shard"][index]
        with self._map.reading(shards):
            found = [zlib.crc32(memory[a:b]) for a, b in spans]
        intact: NDArray[np.bool_] = np.array(found, np.uint32) == self._rows["crc32"][index]
        # As in `read`.
        for shard in np.unique(shards[~intact]).tolist():
            if self._map.renew(shard):
                own = shards == shard
                intact[own] = self.intact(index[own])
        return intact

    def map_all(self) -> None:
        """Map every shard now, so that a later change of the folder does not matter.

        The shards of a set behind a URL are still fetched when they are needed.

        Raises:
            CorruptShardError: A shard is missing or has another size than the manifest says, or
                the folder holds another set by now.
        """
        self._map.map_all()

    def check_sizes(self) -> None:
        """Make sure that every shard of a folder has the size that the manifest says.

        Raises:
            CorruptShardError: A shard is missing, or has another size.
        """
        self._map.check_sizes()

    @functools.cached_property
    def _gather(self) -> Gather:
        if self._codec.chunk_frames is None:
            return PlainGather(self._map, self.stored_dtype)
        return ZstdGather(self._map, self._codec.chunk_frames)

    def read_ahead(self, shard: int) -> None:
        """Have a whole shard read into memory, or fetched, in the background.

        Raises:
            CorruptShardError: The shard is missing, or has another size than the manifest says.
        """
        self._map.read_ahead(shard)

    @property
    def place(self) -> Location:
        """The folder of the set, or its URL; of the first of several."""
        return self._origins[0].files.place

    def wanted_shards(self) -> WantedShards:
        """What one reader says that it will read next; at first, nothing."""
        return WantedShards(self._map)

    @property
    def room(self) -> int | None:
        """Bytes of shards that one reader may want at a time; None for no limit."""
        return self._map.room

    @property
    def shard_bytes(self) -> NDArray[np.int64]:
        """Size of each shard (shards,), in the order of the index."""
        return np.array([shard.bytes for _, shard in self._shards], np.int64)

    @property
    def shard_samples(self) -> tuple[int, ...]:
        """Utterances of each shard, in the order of the index."""
        return tuple(shard.samples for _, shard in self._shards)

    @property
    def nbytes(self) -> int:
        """Size of all stored matrices in bytes, uncompressed."""
        frames = sum(shard.frames for _, shard in self._shards)
        return frames * self.n_mels * self.stored_dtype.itemsize

    def _check_range(self, index: NDArray[np.int64]) -> None:
        if index.size and (index.min() < 0 or index.max() >= len(self)):
            raise IndexError(f"indices reach beyond a split of {len(self)}")

    def damaged(self, index: int, what: str = CRC_FAULT) -> CorruptShardError:
        """The error about an utterance's stored bytes, with file, key and remedy."""
        row = self._rows[index]
        origin, shard = self._shards[int(row["shard"])]
        path = origin.files.place / shard.file
        return CorruptShardError(what, file=path, key=row["key"].decode(), remedy=_remedy(origin))


def _buffer(out: NDArray[Any] | None, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """The buffer that is given, or a new one; ValueError if the given one does not fit."""
    if out is None:
        return np.empty(shape, dtype)
    if out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous:
        raise ValueError(f"out must be a contiguous array {shape} of {dtype}")
    return out


def _concatenate(parts: Sequence[NDArray[Any] | None]) -> NDArray[Any] | None:
    """A column of several indexes as one; None where they have no such column."""
    found = [part for part in parts if part is not None]
    return np.concatenate(found) if found else None


def _remedy(origin: Origin) -> str:
    return REBUILD if isinstance(origin.files.place, Remote) else origin.manifest.remedy


def _open_index(
    origin: Origin, split: str, begins: NDArray[np.int64]
) -> tuple[NDArray[Any], Columns]:
    """The index of a split of a set, checked: its rows and columns, none if there is no such split.

    Args:
        origin: The set.
        split: Name of the split.
        begins: Where each of its shards begins (shards,), in bytes of the mapped shards.

    Raises:
        CorruptShardError: The index is missing or damaged, or does not fit the manifest.
        StorageError: The machine cannot read it now, or the store does not answer.
    """
    info = origin.manifest.splits.get(split)
    if info is None:
        quantised = origin.manifest.is_quantised
        return np.empty(0, index_dtype(1, quantised=quantised)), Columns.empty(
            0, quantised=quantised
        )
    rows = load_index(origin.files, info, quantised=origin.manifest.is_quantised)
    try:
        return rows, load_columns(rows, info, origin.manifest, begins)
    except ValueError as error:
        raise CorruptShardError(
            f"the {error} in the index does not fit the manifest",
            file=origin.files.place / info.index.file,
            remedy=_remedy(origin),
        ) from None
