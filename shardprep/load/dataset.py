"""A split as PyTorch's map-style `Dataset`: one item an utterance, one gather a batch.

Axis legend: B batch, T frames, F mel bins.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from shardprep.load.damage import ReadGuard, VerifyReads
from shardprep.read.split import Split

Item = dict[str, Any]

_NUMBERS = ("label", "length", "index")


class SegmentDataset(Dataset[Item]):
    """The utterances of a split, for a DataLoader with samplers and workers of your choice.

        dataset = shardprep.SegmentDataset(split, segment_frames=128)
        loader = DataLoader(dataset, batch_size=32, shuffle=True, collate_fn=dataset.collate)

    It works under fork, spawn and forkserver. A DataLoader asks for all items of a batch at once
    (`__getitems__`), which is one gather from the memory maps. `collate` takes the batch as it was
    gathered; PyTorch's own collate function works too and copies it once more.

    `SegmentLoader`, an IterableDataset with a state, is faster, shuffles data larger than memory,
    and resumes within an epoch.

    Args:
        split: What to read.
        segment_frames: Frames T of a segment; shorter utterances are padded at their end. None for
            whole utterances, whose batches need `collate`.
        random_start: Whether a segment begins at a random frame, drawn from PyTorch's generator of
            this process: a DataLoader seeds that of its workers. Otherwise at the first frame.
        pad_value: Fills padded frames.
        verify_reads: Whether the crc32 of an utterance is checked before it is used: "never",
            "once" in this process, or "always". None for "never" with segments, and "always" with
            whole utterances.

    An item is a dict: mel (T, F), a tensor of the stored dtype, float32 of a set of uint8; and
    label, length (frames that are not padding) and index (position in the split), whole numbers.
    The label is -1 where the speaker is unknown.

    Raises:
        ValueError: An argument is out of range.
        CorruptShardError: While reading: a shard cannot be read, or an utterance is damaged.
    """

    def __init__(
        self,
        split: Split,
        segment_frames: int | None = 128,
        *,
        random_start: bool = True,
        pad_value: float = -20.0,
        verify_reads: VerifyReads | None = None,
    ) -> None:
        if segment_frames is not None:
            segment_frames = operator.index(segment_frames)
            if segment_frames < 1:
                raise ValueError(f"segment_frames {segment_frames}: must be positive, or None")
        self.split = split
        self._frames = segment_frames
        self._random_start = random_start
        self._pad_value = pad_value
        usual: VerifyReads = "always" if segment_frames is None else "never"
        self._guard = ReadGuard(split, verify_reads or usual, "raise", 0)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: SupportsIndex) -> Item:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[SupportsIndex]) -> Sequence[Item]:
        """The items of a batch, which are gathered at once; see `collate`."""
        if not len(indices):
            return ()
        chosen = self._positions(indices)
        split = self.split
        frames = split.frames[chosen]
        self._guard.undamaged(chosen)
        length = int(frames.max()) if self._frames is None else self._frames
        starts = self._starts(frames, length)
        mel = torch.from_numpy(split.segments(chosen, starts, length, self._pad_value))
        batch = {
            "mel": mel,
            "label": torch.from_numpy(split.labels[chosen].astype(np.int64)),
            "length": torch.from_numpy(np.minimum(frames, length)),
            "index": torch.from_numpy(chosen),
        }
        return _Gathered(batch, whole=self._frames is None)

    def _positions(self, indices: Sequence[SupportsIndex]) -> NDArray[np.int64]:
        """Positions in the split (B,) of indices, of which negative ones count from its end."""
        count = len(self)
        numbers = [operator.index(index) for index in indices]
        for number in (min(numbers), max(numbers)):
            if not -count <= number < count:
                raise IndexError(f"utterance {number} of a split of {count}")
        chosen = np.array(numbers, np.int64)
        return np.where(chosen < 0, chosen + count, chosen)

    def _starts(self, frames: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """Where the segments of utterances begin (B,)."""
        if self._frames is None or not self._random_start:
            return np.zeros_like(frames)
        drawn = torch.rand(len(frames), dtype=torch.float64).numpy()
        starts: NDArray[np.int64] = np.floor(drawn * (np.maximum(frames - length, 0) + 1))
        return starts.astype(np.int64)

    def collate(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """Make a batch of items, for `collate_fn`; shorter ones are padded at their end.

        Args:
            items: From `__getitems__`, whose batch is taken as it is; or any items.

        Returns:
            mel (B, T, F), and label, length and index (B,), int64.
        """
        if isinstance(items, _Gathered):
            return items.batch
        mels = [item["mel"] for item in items]
        return {
            "mel": pad_sequence(mels, batch_first=True, padding_value=self._pad_value),
            **{name: torch.tensor([item[name] for item in items]) for name in _NUMBERS},
        }


class _Gathered(Sequence[Item]):
    """The items of a batch, which share the memory of the batch; made when one is asked for.

    Args:
        batch: What `SegmentDataset.collate` gives.
        whole: Whether items are whole utterances, and have no padding.
    """

    def __init__(self, batch: dict[str, Tensor], *, whole: bool) -> None:
        self.batch = batch
        self._whole = whole

    def __len__(self) -> int:
        return len(self.batch["mel"])

    def __getitem__(self, at: Any) -> Any:
        return self._items[at]

    @functools.cached_property
    def _items(self) -> list[Item]:
        numbers = [self.batch[name].tolist() for name in _NUMBERS]
        items = zip(self.batch["mel"].unbind(), *numbers, strict=True)
        return [
            {
                "mel": mel[:length] if self._whole else mel,
                "label": label,
                "length": length,
                "index": index,
            }
            for mel, label, length, index in items
        ]
