"""What `shardprep build --on-error skip` left out of a data set, and thus out of a prediction."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from shardprep import CorruptShardError, ShardSet

_SHOWN = 3


@dataclass(frozen=True)
class LeftOut:
    """The utterances that a build rejected."""

    listing: Path
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
    path = shards.path / shards.manifest.rejects.file
    try:
        rows = [json.loads(line) for line in path.read_bytes().splitlines()]
        return LeftOut(
            listing=path,
            total=len(rows),
            test=tuple(row["file"] for row in rows if row["split"] == "test"),
            ids=frozenset(name for row in rows for name in (row["file"], f"{row['key']}.pt")),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptShardError(
            "is not the list of rejected utterances that the manifest names",
            file=path,
            remedy="`shardprep verify` tells what else is damaged; build the shards again.",
        ) from error
