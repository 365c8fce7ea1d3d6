"""Reads the matrices of a source from its files, one a file; the next files are read ahead."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from shardprep.source.contents import Matrix, Utterance
from shardprep.source.features import Expected, check_file_size, load_features
from shardprep.storage.local import fetch
from shardprep.storage.remote import Location, Remote

# Enough requests at once to keep a disk or a store busy; they take a few MB of memory.
_FILES_AHEAD = 32


@dataclass(frozen=True)
class FileReader:
    """Reads `.pt` and `.npy` files; see `Reader`.

    Attributes:
        root: Folder or URL.
        length: What the source calls the length of an utterance, for messages.
    """

    root: Location
    length: str = "mel_len"

    def read(
        self, utterances: Sequence[Utterance], n_mels: int
    ) -> Iterator[tuple[Utterance, Matrix]]:
        """See `Reader.read`."""
        for utterance, file in self._files(utterances, n_mels):
            expected = self._expected(utterance, n_mels)
            try:
                if isinstance(file, ValueError):
                    raise file
                mel = load_features(file, expected, npy=utterance.path.endswith(".npy"))
            except ValueError as fault:
                yield utterance, fault
            else:
                yield utterance._replace(frames=len(mel)), mel

    def _files(
        self, utterances: Sequence[Utterance], n_mels: int
    ) -> Iterator[tuple[Utterance, Path | bytes | ValueError]]:
        """The utterances with their files: the path, or the bytes, or why there are none."""
        later = iter(utterances)
        if isinstance(self.root, Remote):
            with ThreadPoolExecutor(_FILES_AHEAD) as threads:
                requests = deque[Future[bytes | ValueError]]()
                for utterance in utterances:
                    for following in itertools.islice(later, _FILES_AHEAD - len(requests)):
                        requests.append(threads.submit(self._fetch, following, n_mels))
                    yield utterance, requests.popleft().result()
            return
        for number, utterance in enumerate(utterances):
            for following in itertools.islice(later, 1 if number else _FILES_AHEAD):
                fetch(os.path.join(self.root, following.path))
            yield utterance, self.root / utterance.path

    def _fetch(self, utterance: Utterance, n_mels: int) -> bytes | ValueError:
        """The bytes of a file in a store, or why it cannot be used."""
        assert isinstance(self.root, Remote)
        try:
            check_file_size(utterance.nbytes, self._expected(utterance, n_mels))
            # The size is known already, so a ranged read saves one request.
            return (self.root / utterance.path).read(0, utterance.nbytes)
        except ValueError as fault:
            return fault
        except FileNotFoundError:
            return ValueError("the file does not exist")

    def _expected(self, utterance: Utterance, n_mels: int) -> Expected:
        return Expected(n_mels, utterance.frames, self.length)
