"""Names of encoders, and which of them may be imported.

An encoder of one's own is code. It is imported only where the user names it: on the command line,
or in a recipe or a YAML file that the user wrote. A checkpoint, the folder of a model and the
config.yaml of a run may come from a stranger, so a name in them alone imports nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection

BLOCKS = ("conformer", "transformer")
"""Encoders that are stacks of blocks, made by the fields of `ModelConfig`."""
SHIPPED = frozenset(
    {"shardprep_trainer.model.trunk:ResNet", "shardprep_trainer.model.trunk:ResNetConformer"}
)
"""Classes that come with the trainer. Not a prefix: other modules of it are no encoders."""
ALLOWED = f"{', '.join(BLOCKS)}, or package.module:Class"

# ASCII, so that the name of a stranger does nothing to a terminal.
_CLASS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
_LONGEST = 200


def is_name(encoder: str) -> bool:
    """Whether a text can be the name of an encoder."""
    return encoder in BLOCKS or (len(encoder) <= _LONGEST and bool(_CLASS.fullmatch(encoder)))


def is_foreign(encoder: str) -> bool:
    """Whether an encoder is code that does not come with the trainer."""
    return encoder not in BLOCKS and encoder not in SHIPPED


def may_import(encoder: str, named: Collection[str]) -> bool:
    """Whether an encoder may be imported, given the names that the user wrote."""
    return not is_foreign(encoder) or encoder in named
