"""Reads the matrices of a source from its files, one a file; the next files are read ahead."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
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
        files = files_of(
            self.root,
            utterances,
            lambda utterance: utterance.path,
            lambda utterance: self._check(utterance, n_mels),
        )
        for utterance, file in files:
            expected = self._expected(utterance, n_mels)
            try:
                if isinstance(file, ValueError):
                    raise file
                mel = load_features(file, expected, npy=utterance.path.endswith(".npy"))
            except ValueError as fault:
                yield utterance, fault
            else:
                yield utterance._replace(frames=len(mel)), mel

    def _check(self, utterance: Utterance, n_mels: int) -> None:
        check_file_size(utterance.nbytes, self._expected(utterance, n_mels))

    def _expected(self, utterance: Utterance, n_mels: int) -> Expected:
        return Expected(n_mels, utterance.frames, self.length)


def files_of(
    root: Location,
    utterances: Sequence[Utterance],
    path_of: Callable[[Utterance], str],
    check: Callable[[Utterance], None],
) -> Iterator[tuple[Utterance, Path | bytes | ValueError]]:
    """Utterances with their files: the path, or the bytes, or why there are none.

    Args:
        root: Folder or URL.
        utterances: The utterances.
        path_of: Where the file of one lies, relative to the folder.
        check: Raises a ValueError for a file in a store that is not worth fetching.
    """

    def fetched(utterance: Utterance) -> bytes | ValueError:
        assert isinstance(root, Remote)
        try:
            check(utterance)
            # The size is known already, so a ranged read saves one request.
            return (root / path_of(utterance)).read(0, utterance.nbytes)
        except ValueError as fault:
            return fault
        except FileNotFoundError:
            return ValueError("the file does not exist")

    later = iter(utterances)
    if isinstance(root, Remote):
        with ThreadPoolExecutor(_FILES_AHEAD) as threads:
            requests = deque[Future[bytes | ValueError]]()
            for utterance in utterances:
                for following in itertools.islice(later, _FILES_AHEAD - len(requests)):
                    requests.append(threads.submit(fetched, following))
                yield utterance, requests.popleft().result()
        return
    for number, utterance in enumerate(utterances):
        for following in itertools.islice(later, 1 if number else _FILES_AHEAD):
            fetch(os.path.join(root, path_of(following)))
        yield utterance, root / path_of(utterance)
