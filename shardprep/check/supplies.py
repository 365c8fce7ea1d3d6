"""What a repair takes from the data set that a shard set was built from."""

from __future__ import annotations

from shardprep.build.shard import encode_file, fetch_file
from shardprep.format.manifest import Manifest
from shardprep.source.dataset import scan_dataset
from shardprep.storage.remote import Location


class Supplies:
    """Stored bytes of utterances, made anew from the data set that they came from.

    Args:
        source: The data set.
        manifest: Of the set that is repaired.

    Attributes:
        notes: Of utterances that it could not give, why.
    """

    def __init__(self, source: Location, manifest: Manifest) -> None:
        self.scanned = scan_dataset(source)
        self.notes: list[str] = []
        self._manifest = manifest

    def __call__(self, key: str, frames: int) -> bytes | None:
        """The bytes that a build would store of an utterance, or None."""
        utterance = self.scanned.by_key.get(key)
        path = self.scanned.root / (f"{key}.pt" if utterance is None else utterance.path)
        try:
            if utterance is None:
                raise ValueError("is not in the data set, or faulty")
            return encode_file(
                fetch_file(self.scanned.root, utterance, self._manifest.n_mels),
                n_mels=self._manifest.n_mels,
                frames=frames,
                dtype=self._manifest.dtype,
                codec=self._manifest.codec,
            )
        except ValueError as error:
            self.notes.append(f"{path}: {error}")
            return None
