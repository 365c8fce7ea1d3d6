"""What a program gives to a `ShardWriter`, checked."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardprep.errors import BuildError
from shardprep.format.limits import MAX_N_MELS
from shardprep.format.manifest import Features
from shardprep.source.metadata import MOST_SHOWN, is_unicode

SPLITS = ("train", "val", "test")


def checked_n_mels(n_mels: object) -> int:
    """A number of mel bins. BuildError if there cannot be so many."""
    try:
        number = 0 if isinstance(n_mels, bool) else operator.index(n_mels)  # type: ignore[arg-type]
    except TypeError:
        number = 0
    if not 1 <= number <= MAX_N_MELS:
        raise BuildError(f"is {n_mels!r:.60}, expected 1 to {MAX_N_MELS}", key="n_mels")
    return number


def check_speaker(speaker: object, split: object) -> None:
    """ValueError if an utterance cannot have this speaker, or go to this split."""
    if split is not None and split not in SPLITS:
        raise ValueError(f"the split is {split!r:.60}, expected one of {', '.join(SPLITS)}")
    if speaker is None:
        if split in ("train", "val"):
            raise ValueError(f"has no speaker, which the split {split} needs")
    elif not isinstance(speaker, str):
        raise ValueError(f"the speaker is {speaker!r:.60}, expected a text such as str(speaker)")
    elif not speaker.strip():
        raise ValueError("the speaker is an empty text; leave it out where it is unknown")
    elif not is_unicode(speaker) or len(speaker) > MOST_SHOWN:
        raise ValueError(f"the speaker is not valid Unicode of at most {MOST_SHOWN} characters")


def as_array(matrix: Any) -> NDArray[Any]:
    """What a program gives as a matrix, as an array of floats. ValueError if it is none."""
    try:
        if hasattr(matrix, "detach"):
            # A tensor of PyTorch; NumPy has no bfloat16.
            tensor = matrix.detach().cpu()
            wide = tensor.is_floating_point() and tensor.element_size() < 4
            matrix = (tensor.float() if wide else tensor).numpy()
        array = np.asarray(matrix)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"is no matrix: {str(error)[:200]}") from None
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise ValueError(
            f"holds {str(array.dtype)[:60]} numbers, expected floating point; add "
            "numpy.asarray(matrix, numpy.float32)"
        )
    return array


def checked_features(features: Mapping[str, Any] | None) -> Features | None:
    """The recipe of the features, as the manifest can state it. BuildError if it cannot."""
    if features is None:
        return None
    for name, value in features.items():
        plain = value is None or isinstance(value, str | bool | int | float)
        if isinstance(value, float) and not math.isfinite(value):
            plain = False
        texts = [text for text in (name, value) if isinstance(text, str)]
        if not isinstance(name, str) or not plain or not all(map(is_unicode, texts)):
            raise BuildError(
                f"{name!r:.60} is {value!r:.60}, expected a text, a number, True, False or None",
                key="features",
            )
    return dict(features)
