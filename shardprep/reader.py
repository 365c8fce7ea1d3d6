"""Read a shard set through memory maps: whole utterances, and whole batches of crops.

The index says where every mel matrix lies, so nothing here parses a tar or a JSON file.
"""

from __future__ import annotations

import functools
import mmap
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shardprep import codecs
from shardprep.errors import CorruptShardError, FormatError
from shardprep.format import Manifest, load_manifest
from shardprep.sidecars import REBUILD, load_index, read_rejects
from shardprep.source import Reject


class ShardSet(Mapping[str, "Split"]):
    """An open shard set: `shard_set["train"]` is a `Split`.

    Attributes:
        path: The folder.
        manifest: What manifest.json says.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._open: dict[str, Split] = {}

    @property
    def speakers(self) -> tuple[str, ...]:
        """Speaker names; the position is the label."""
        return self.manifest.speakers

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self.manifest.splits)

    @functools.cached_property
    def rejects(self) -> tuple[Reject, ...]:
        """Utterances that the build left out, with the reasons.

        Raises:
            CorruptShardError: The list of them is missing or damaged.
        """
        return read_rejects(self.path, self.manifest)

    def __getitem__(self, name: str) -> Split:
        """Open a split; its index and maps are shared by all who ask for it.

        Raises:
            FormatError: The set has no such split.
            CorruptShardError: The split's files do not fit the manifest.
        """
        if name not in self.manifest.splits:
            raise FormatError(
                f"there is no split {name!r}; the set has {', '.join(self.splits)}", file=self.path
            )
        if name not in self._open:
            self._open[name] = Split(self.path, name, self.manifest)
        return self._open[name]

    def __iter__(self) -> Any:
        return iter(self.manifest.splits)

    def __len__(self) -> int:
        return len(self.manifest.splits)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}={split.samples}" for name, split in self.manifest.splits.items())
        return f"ShardSet({str(self.path)!r}, {sizes})"


class Split:
    """One split of a shard set, in the order of its index.

    Attributes:
        name: "train", "val" or "test".
        n_mels: Mel bins F.
        dtype: Element type of what is read.
        fingerprint: Fingerprint of the set.
        labels: Speaker numbers (N,) int32; -1 where unknown.
        frames: Lengths in mel frames (N,) int64.
    """

    def __init__(self, folder: Path, name: str, manifest: Manifest) -> None:
        self.name = name
        self.n_mels = manifest.n_mels
        self.dtype = manifest.numpy_dtype
        self.fingerprint = manifest.fingerprint
        self._codec = manifest.codec
        self._folder = folder
        self._info = manifest.splits[name]
        self._rows = load_index(folder, self._info)
        self.labels: NDArray[np.int32] = np.ascontiguousarray(self._rows["label"])
        self.frames: NDArray[np.int64] = self._rows["frames"].astype(np.int64)
        self._shard: NDArray[np.int64] = self._rows["shard"].astype(np.int64)
        self._offset: NDArray[np.int64] = self._rows["offset"].astype(np.int64)
        self._check_bounds(len(manifest.speakers))
        self._maps: dict[int, NDArray[np.uint8]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __getstate__(self) -> dict[str, Any]:
        # Another process maps the shards itself; pickled, they would travel byte by byte.
        return {**self.__dict__, "_maps": {}}

    def __repr__(self) -> str:
        return f"Split({self.name!r}, {len(self)} utterances, {int(self.frames.sum())} frames)"

    @property
    def locations(self) -> NDArray[Any]:
        """The index rows (N,): shard, offset, nbytes, frames, label, crc32, key; see FORMAT.md."""
        return self._rows

    @functools.cached_property
    def keys(self) -> NDArray[np.str_]:
        """Keys of the utterances (N,), strings."""
        return np.char.decode(self._rows["key"], "utf-8")

    def read(self, index: int) -> NDArray[Any]:
        """One whole utterance, its crc32 checked.

        Args:
            index: Position in the split.

        Returns:
            Matrix (frames, F) of the stored dtype; a copy.

        Raises:
            IndexError: There is no such position.
            CorruptShardError: The stored bytes are damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"utterance {index} of a split of {len(self)}")
        payload = self._payload(index)
        if zlib.crc32(payload) != self._rows["crc32"][index]:
            raise self._damaged(index, "the stored bytes do not match their crc32")
        try:
            mel = codecs.decode(payload, self._codec)
        except ValueError as error:
            raise self._damaged(index, f"the stored bytes cannot be decoded ({error})") from None
        if mel.shape != (self.frames[index], self.n_mels) or mel.dtype != self.dtype:
            raise self._damaged(index, f"holds {mel.dtype} {mel.shape}, unlike the index")
        return mel

    def crops(
        self,
        indices: ArrayLike,
        starts: ArrayLike,
        length: int,
        pad_value: float = -20.0,
        out: NDArray[Any] | None = None,
    ) -> NDArray[Any]:
        """A batch of crops, straight from the memory maps; crc32s are not checked.

        Args:
            indices: Positions in the split (B,).
            starts: First frame of each crop (B,), within its utterance.
            length: Frames T a crop.
            pad_value: Fills a crop behind the end of its utterance.
            out: Buffer (B, T, F) of the stored dtype to fill; a new one by default.

        Returns:
            Matrices (B, T, F) of the stored dtype.

        Raises:
            IndexError: An index or a start is out of range.
            CorruptShardError: A compressed chunk is damaged.
        """
        index = np.asarray(indices, np.int64)
        start = np.asarray(starts, np.int64)
        if length < 1 or index.ndim != 1 or index.shape != start.shape:
            raise ValueError("crops needs indices (B,), starts (B,) and a positive length")
        if index.size and (index.min() < 0 or index.max() >= len(self)):
            raise IndexError(f"indices reach beyond a split of {len(self)}")
        if ((start < 0) | (start >= self.frames[index])).any():
            raise IndexError("a crop starts outside its utterance")
        shape = (len(index), length, self.n_mels)
        if out is None:
            out = np.empty(shape, self.dtype)
        elif out.shape != shape or out.dtype != self.dtype or not out.flags.c_contiguous:
            raise ValueError(f"out must be a contiguous array {shape} of {self.dtype}")
        valid = np.minimum(self.frames[index] - start, length)
        if self._codec.name == "none":
            self._gather(index, start, valid, length, pad_value, out)
        else:
            self._inflate(index, start, valid, pad_value, out)
        return out

    def _gather(
        self,
        index: NDArray[np.int64],
        start: NDArray[np.int64],
        valid: NDArray[np.int64],
        length: int,
        pad_value: float,
        out: NDArray[Any],
    ) -> None:
        """Copy full crops by one strided gather a shard, and short ones singly."""
        size = length * self.n_mels
        flat = out.reshape(len(index), size)
        # Position of each crop in elements of its shard; members begin at multiples of 512 bytes.
        first = (self._offset[index] + codecs.NPY_HEADER_BYTES) // self.dtype.itemsize
        first += start * self.n_mels
        shard = self._shard[index]
        full = np.flatnonzero(valid == length)
        full = full[np.argsort(shard[full], kind="stable")]
        cuts = np.flatnonzero(np.diff(shard[full])) + 1
        for rows in np.split(full, cuts) if full.size else ():
            flat[rows] = self._crop_windows(int(shard[rows[0]]), size)[first[rows]]
        for row in np.flatnonzero(valid < length):
            count = int(valid[row]) * self.n_mels
            elements = self._map(int(shard[row])).view(self.dtype)
            flat[row, :count] = elements[first[row] : first[row] + count]
            flat[row, count:] = pad_value

    def _crop_windows(self, shard: int, size: int) -> NDArray[Any]:
        """Every run of `size` elements of a shard, as an overlapping view (positions, size)."""
        elements = self._map(shard).view(self.dtype)
        step = elements.itemsize
        # Unlike `as_strided`, this refuses a shape that reaches beyond the buffer.
        return np.ndarray((len(elements) - size + 1, size), self.dtype, elements, 0, (step, step))

    def _inflate(
        self,
        index: NDArray[np.int64],
        start: NDArray[np.int64],
        valid: NDArray[np.int64],
        pad_value: float,
        out: NDArray[Any],
    ) -> None:
        """Inflate the chunks that the crops touch, all in one call, and copy the crops out."""
        chunk = self._codec.chunk_frames
        assert chunk is not None
        first, last = start // chunk, (start + valid - 1) // chunk
        parts: list[list[memoryview]] = []
        for i, begin, end in zip(index, first, last, strict=True):
            member = self._payload(int(i))
            table = codecs.seek_table_at(member, int(self.frames[i]), chunk)
            spans = zip(*codecs.chunk_spans(table, int(begin), int(end)), strict=True)
            parts.append([member[a:b] for a, b in spans])
        try:
            inflated = codecs.inflate_many([part for own in parts for part in own])
        except ValueError:
            self._name_damaged_chunk(index, parts)
            raise
        at = 0
        for row, i in enumerate(index):
            count = int(last[row] - first[row]) + 1
            mel = np.frombuffer(b"".join(inflated[at : at + count]), self.dtype)
            at += count
            skip = int(start[row] - first[row] * chunk) * self.n_mels
            size = int(valid[row]) * self.n_mels
            if len(mel) < skip + size:
                raise self._damaged(int(i), "its chunks are shorter than the index says")
            out[row, : valid[row]] = mel[skip : skip + size].reshape(-1, self.n_mels)
            out[row, valid[row] :] = pad_value

    def _name_damaged_chunk(self, index: NDArray[np.int64], parts: list[list[memoryview]]) -> None:
        """Inflate utterance by utterance, to find the one whose chunk is damaged."""
        for i, own in zip(index, parts, strict=True):
            try:
                codecs.inflate_many(own)
            except ValueError as error:
                raise self._damaged(int(i), f"a chunk cannot be inflated ({error})") from None

    def _payload(self, index: int) -> memoryview:
        shard = self._map(int(self._shard[index]))
        begin = int(self._offset[index])
        return shard.data[begin : begin + int(self._rows["nbytes"][index])]

    def _map(self, shard: int) -> NDArray[np.uint8]:
        """The bytes of a shard, mapped when first needed."""
        if shard not in self._maps:
            info = self._info.shards[shard]
            path = self._folder / info.file
            self._maps[shard] = _map_file(path, info.bytes)
        return self._maps[shard]

    def _check_bounds(self, speakers: int) -> None:
        """Refuse an index that points outside the shards: the gather trusts it."""
        sizes = np.array([shard.bytes for shard in self._info.shards], np.int64)
        rows, counted = self._rows, self._info
        nbytes = rows["nbytes"].astype(np.int64)
        plain = codecs.NPY_HEADER_BYTES + self.frames * self.n_mels * self.dtype.itemsize
        chunk = self._codec.chunk_frames
        fits = {
            "number of utterances": len(rows) == counted.samples,
            "number of frames": int(self.frames.sum()) == counted.frames,
            "shard number": bool((self._shard < len(sizes)).all()),
            "label": bool(((self.labels >= -1) & (self.labels < speakers)).all()),
            "frames": bool((self.frames > 0).all()),
            "size": bool((nbytes == plain).all())
            if chunk is None
            else bool((nbytes > 17 + 8 * (1 + -(-self.frames // chunk))).all()),
        }
        if fits["shard number"]:
            ends = self._offset + nbytes
            aligned = (self._offset >= 0) & (self._offset % 512 == 0)
            fits["offset"] = (
                bool((aligned & (ends <= sizes[self._shard])).all()) if len(rows) else True
            )
        for what, good in fits.items():
            if not good:
                raise CorruptShardError(
                    f"the {what} in the index does not fit the manifest",
                    file=self._folder / counted.index.file,
                    remedy=REBUILD,
                )

    def _damaged(self, index: int, what: str) -> CorruptShardError:
        info = self._info.shards[int(self._shard[index])]
        return CorruptShardError(
            what, file=self._folder / info.file, key=str(self.keys[index]), remedy=REBUILD
        )


def open_shards(path: str | os.PathLike[str]) -> ShardSet:
    """Open a shard folder.

    Args:
        path: A folder that `shardprep build` made.

    Raises:
        FormatError: The folder holds no finished shard set, or one of another version.
    """
    folder = Path(path)
    return ShardSet(folder, load_manifest(folder))


def _map_file(path: Path, expected: int) -> NDArray[np.uint8]:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != expected:
                raise CorruptShardError(
                    f"has {size} bytes, expected {expected}", file=path, remedy=REBUILD
                )
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CorruptShardError(
            f"cannot be read: {error.strerror}", file=path, remedy=REBUILD
        ) from None
    return np.frombuffer(mapped, np.uint8)
