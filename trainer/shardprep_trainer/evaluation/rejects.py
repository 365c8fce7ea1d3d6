"""What `shardprep build --on-error skip` left out of a data set, and thus out of a prediction."""

from __future__ import annotations

import os
from dataclasses import dataclass

from shardprep import ShardSet

_SHOWN = 3


@dataclass(frozen=True)
class LeftOut:
    """The utterances that a build rejected."""

    listing: os.PathLike[str]
    """The file that lists them, with the reasons."""
    total: int
    test: tuple[str, ...]
    """Files of those without a label, which a submission needs."""
    ids: frozenset[str]
    """What a submission would call them, all splits together."""

    def notes(self, split: str) -> list[str]:
        """What a user who predicts `split` must know, as lines of text."""
        lines = [f"the build left {self.total:,} utterances out; {self.listing} lists them"]
        if split == "test" and self.test:
            shown = ", ".join(self.test[:_SHOWN]) + (", ..." if len(self.test) > _SHOWN else "")
            lines.append(
                f"{len(self.test):,} of them are test utterances, for which there can be no row: "
                f"{shown}"
            )
        return lines


def read_left_out(shards: ShardSet) -> LeftOut | None:
    """Read rejects.jsonl; None where the build left nothing out.

    Raises:
        CorruptShardError: The file is missing or not as the build wrote it.
    """
    if shards.manifest.rejects is None:
        return None
    rejects = shards.rejects
    return LeftOut(
        listing=shards.path / shards.manifest.rejects.file,
        total=len(rejects),
        test=tuple(reject.file for reject in rejects if reject.split == "test"),
        ids=frozenset(name for reject in rejects for name in (reject.file, f"{reject.key}.pt")),
    )
