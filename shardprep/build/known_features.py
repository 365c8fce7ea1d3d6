"""The recipe of a set or of a model, for recordings that shall become the same features."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from shardprep.audio.recipe import FeatureRecipe
from shardprep.errors import FormatError
from shardprep.format.manifest import MANIFEST_NAME
from shardprep.read.manifest_file import load_manifest
from shardprep.storage.local import read_at_most
from shardprep.storage.remote import locate
from shardprep.storage.trouble import machine_errors

HOMEWORK = "homework"
"""Stands for the homework's recipe."""

# Where a model describes itself: in its own folder, or in that of its run.
_MODELS = ("config.json", "model/config.json")
_MOST_BYTES = 64 << 20


class _Model(msgspec.Struct):
    """Of the description of a model, its features."""

    features: dict[str, Any] | None = None


def recipe_at(place: str | os.PathLike[str]) -> FeatureRecipe:
    """The recipe of the features of a shard set or of a model.

    Args:
        place: A set (a folder or a URL), the folder of a model, that of a run, a file of either, or
            the word homework.

    Raises:
        FormatError: There is neither, or its features are not known or of another kind.
        StorageError: The machine cannot read it now, or the store does not answer.
    """
    if place == HOMEWORK:
        return FeatureRecipe()
    found = locate(place)
    if isinstance(found, Path):
        folder = found.parent if found.is_file() else found
        for name in _MODELS:
            if (folder / name).is_file():
                return FeatureRecipe.from_features(_of_model(folder / name), where=str(place))
        if not (folder / MANIFEST_NAME).exists():
            raise FormatError(
                f"has neither {MANIFEST_NAME} nor {_MODELS[0]}",
                file=place,
                remedy=f"Name a shard set, a run, the folder of a model, or {HOMEWORK}.",
            )
        found = folder
    return FeatureRecipe.from_features(load_manifest(found).features, where=str(place))


def _of_model(file: Path) -> dict[str, Any] | None:
    try:
        with machine_errors(file):
            return msgspec.json.decode(read_at_most(file, _MOST_BYTES), type=_Model).features
    except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
        raise FormatError(f"is no description of a model ({error})", file=file) from None
