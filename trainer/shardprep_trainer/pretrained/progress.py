"""How far a command has come, and the time left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress(
    items: Iterable[Item], total: int, what: str, size: Callable[[Item], int], unit: str = "utt"
) -> Iterator[Item]:
    """Show on stderr how far a pass has come, and the time left; silent without a terminal.

    Args:
        items: What is passed on, one after the other.
        total: The sum of their sizes.
        what: What is shown before the bar.
        size: Of an item [unit].
        unit: The unit.
    """
    with tqdm(
        total=total, desc=what, unit=unit, disable=None, dynamic_ncols=True, leave=False
    ) as bar:
        for item in items:
            yield item
            bar.update(size(item))
