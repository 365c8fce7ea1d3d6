"""Which member of the utterances has the matrix."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Sequence

from shardprep.build.foreign.members import other_form
from shardprep.build.foreign.scan import open_tar
from shardprep.build.foreign.tars import ForeignTar
from shardprep.errors import BuildError, SourceError
from shardprep.format.foreign_tar import key_and_extension, reader_of, walk_foreign

_MOST_SHOWN = 8


def choose_member(tars: Sequence[ForeignTar], wanted: str | None) -> str:
    """The extension of the members that have the matrices, in lower case.

    Args:
        tars: The tars; the first one with such members decides.
        wanted: What the user asked for; None for the only extension that ends in npy.

    Raises:
        BuildError: The user asked for another kind of file, or must choose.
        SourceError: No tar has a member that ends in npy, or the first one is none.
        StorageError: The machine cannot read a tar now.
    """
    if wanted is not None:
        chosen = wanted.lower().removeprefix(".")
        if not re.fullmatch(r"([^/\x00-\x20\x7f]{1,60}\.)?npy", chosen):
            raise BuildError(
                f"is {wanted!r}, and only members that end in .npy can be mapped", key="member"
            )
        return chosen
    others: dict[str, None] = {}
    for tar in tars:
        found = _extensions(tar)
        arrays = [extension for extension in found if f".{extension}".endswith(".npy")]
        if len(arrays) > 1:
            raise BuildError(
                f"has several arrays for each utterance: {', '.join(arrays)}",
                file=tar.shown,
                remedy=f"Say which has the mels, such as --member {arrays[0]}.",
            )
        if arrays:
            return arrays[0]
        others.update(dict.fromkeys(found))
    raise _no_arrays(tars[0].shown, list(others))


def _no_arrays(shown: str, others: list[str]) -> SourceError:
    """The error where no member ends in .npy; it says what there is instead."""
    named = []
    for extension in others[:_MOST_SHOWN]:
        form = other_form(extension)
        named.append(f".{extension} ({form})" if form else f".{extension}")
    more = ", ..." if len(others) > _MOST_SHOWN else ""
    what = f", but {', '.join(named)}{more}" if named else ""
    return SourceError(
        f"has no member that ends in .npy{what}",
        file=shown,
        remedy="Only .npy files can be mapped: write such tars again with numpy.save, or pack "
        "their matrices with `shardprep.ShardWriter`.",
    )


def _extensions(tar: ForeignTar) -> list[str]:
    """The extensions of a tar, in the order in which they come; nothing but headers is read."""
    found: dict[str, None] = {}
    with open_tar(tar.path, tar.shown) as file:
        try:
            for member in walk_foreign(reader_of(file), os.fstat(file.fileno()).st_size):
                named = key_and_extension(member.name)
                if named is not None and member.is_plain and len(named[1]) <= 100:
                    found[named[1]] = None
        except tarfile.ReadError:
            # Named when the tar is read.
            pass
    return list(found)
