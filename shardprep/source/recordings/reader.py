"""Reads recordings as log-mels; the next files are read ahead."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shardprep.audio.features import audio_features
from shardprep.audio.recipe import FeatureRecipe
from shardprep.source.contents import Matrix, Utterance
from shardprep.source.reader import files_of
from shardprep.source.recordings.names import piece_of
from shardprep.storage.remote import Location
from shardprep.storage.trouble import machine_errors

# Bytes of a recording in a store, which is fetched whole.
_MOST_BYTES = 4 << 30


@dataclass(frozen=True)
class RecordingReader:
    """Reads recordings; see `Reader`.

    Attributes:
        root: Folder or URL.
        recipe: The recipe from recordings to log-mels.
    """

    root: Location
    recipe: FeatureRecipe

    def read(
        self, utterances: Sequence[Utterance], n_mels: int
    ) -> Iterator[tuple[Utterance, Matrix]]:
        """See `Reader.read`; `n_mels` is that of the recipe."""
        files = files_of(self.root, utterances, lambda own: piece_of(own.path).file, _check)
        for utterance, file in files:
            try:
                mel = self._load(utterance, file)
            except ValueError as fault:
                yield utterance, fault
            else:
                yield utterance._replace(frames=len(mel)), mel

    def _load(self, utterance: Utterance, file: Path | bytes | ValueError) -> NDArray[np.floating]:
        if isinstance(file, ValueError):
            raise file
        piece = piece_of(utterance.path)
        path = None if isinstance(file, bytes) else os.fspath(file)
        try:
            with machine_errors(path):
                mel = audio_features(file, self.recipe, start=piece.start, end=piece.end)
        except OSError as error:
            raise ValueError(f"cannot be read: {error.strerror}") from None
        if utterance.frames not in (0, len(mel)):
            raise ValueError(f"gives {len(mel)} frames, but the list says {utterance.frames}")
        return mel


def _check(utterance: Utterance) -> None:
    if utterance.nbytes > _MOST_BYTES:
        raise ValueError(f"has {utterance.nbytes} bytes, more than the {_MOST_BYTES} that are read")
