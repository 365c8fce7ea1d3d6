"""What lies beside the shards of a new set: its dataset card, and the files of other readers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from shardprep.format.card import CARD_NAME, card, is_card_of_ours
from shardprep.format.manifest import Manifest

# What the tools of other readers write beside tars, to find the members in them: Energon, wids,
# litdata, lhotse, and what `huggingface-cli download` keeps of each file.
_SIDE_FILES = re.compile(
    r"\.nv-meta|\.cache|.+\.idx|(?:index|shards|shardindex|shar_index|train|val|test)\.json"
    r"|index\.json\.zstd|cuts\..*\.jsonl(?:\.gz)?"
)
_MOST_NAMED = 5


def new_card(present: bytes | None, manifest: Manifest) -> bytes | None:
    """The content of README.md for a new set; None where someone's own README.md stays.

    Args:
        present: Content of the README.md that is there; None if there is none.
        manifest: Manifest of the new set.
    """
    if present is None or is_card_of_ours(present):
        return card(manifest).encode()
    return None


def notes_beside(names: Iterable[str], own_card: bool) -> Iterator[str]:
    """What a user should know about the files beside a new set.

    Args:
        names: Names in the place of the set, or paths of objects in it.
        own_card: Whether a README.md stays that no build has written.
    """
    if own_card:
        yield (
            f"{CARD_NAME} stays: it is not a card that a build has written, or it cannot be read; "
            "docs/readers.md has the `configs` that Hugging Face `datasets` needs in it"
        )
    if stale := sorted({top for name in names if _SIDE_FILES.fullmatch(top := name.split("/")[0])}):
        more = f" and {len(stale) - _MOST_NAMED} more" if len(stale) > _MOST_NAMED else ""
        yield (
            f"other readers' files beside the shards describe the former set: "
            f"{', '.join(stale[:_MOST_NAMED])}{more}; remove them, and make them again with the "
            "tool that wrote them"
        )
