"""The best model of a run as a folder: what predicting takes, and nothing of the training.

    RUN/model/model.safetensors   the weights, with their description in the file's metadata
    RUN/model/config.json         the same description, for people and for other tools
    RUN/model/README.md           the model card, made of it
    RUN/model/config.yaml         the options of the run, for another one that begins with the model

Weights and description are one file, and a rename publishes it: a kill at any moment leaves the
model before or the new one, and no reader gets weights with the description of others. The metadata
also has a checksum of both, which safetensors itself lacks. The other files are never read here.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any

import msgspec
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from shardprep import publish
from shardprep_trainer.checkpoint.card import card
from shardprep_trainer.checkpoint.state import (
    FORMAT,
    Checkpoint,
    brief,
    check_format,
    description,
    parse,
)
from shardprep_trainer.errors import CheckpointError, DamagedCheckpointError

WEIGHTS = "model.safetensors"
DESCRIPTION = "config.json"
CARD = "README.md"
RECIPE = "config.yaml"

# Bounds on what reading takes beside the weights: half a million speakers, and many layers.
_HEADER_BYTES = 2**24
_TENSORS = 2**16


def write_model(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the model of a checkpoint, in place of the one before.

    Raises:
        StorageError: The disk refused; the model before is as it was.
    """
    entries = {"format": FORMAT, **description(checkpoint)}
    text = msgspec.json.format(msgspec.json.encode(entries), indent=2)
    weights = {name: weight.cpu().contiguous() for name, weight in checkpoint.weights.items()}
    # "format" is what other readers of safetensors look at.
    metadata = {
        "format": "pt",
        "description": text.decode(),
        "sha256": _sha256(text.decode(), weights),
    }
    data = safetensors.torch.save(weights, metadata)
    about = card(checkpoint, sum(weight.numel() for weight in weights.values())).encode()
    copies = {CARD: about, RECIPE: checkpoint.config.to_yaml().encode(), DESCRIPTION: text}
    with contextlib.ExitStack() as stack:
        for name, content in copies.items():
            other = stack.enter_context(publish(folder / name))
            other.write(content)
            # A full disk is found before the model is replaced.
            other.flush()
        with publish(folder / WEIGHTS) as file:
            file.write(data)


def parse_model(data: bytes, path: Path) -> Checkpoint:
    """Make a checkpoint of a model file, which may come from a stranger; `training` is None.

    The memory taken is in proportion to the size of the file.

    Args:
        data: Its bytes.
        path: Where they come from, for errors to name.

    Raises:
        DamagedCheckpointError: The file is torn, or a byte of it has changed.
        CheckpointError: It has no description of ours, or describes no model.
    """
    header = _header(data, path)
    try:
        metadata = msgspec.json.decode(header, type=_Header).metadata
        # safetensors gives them in an order that differs from one reading to the next.
        weights = dict(sorted(safetensors.torch.load(data).items()))
        text = metadata.get("description")
        intact = text is None or metadata.get("sha256") == _sha256(text, weights)
    except (safetensors.SafetensorError, RuntimeError, TypeError, ValueError, KeyError) as error:
        raise _damaged(path, brief(error)) from error
    if text is None:
        raise CheckpointError(
            f"{path}: does not say what model it is; take a model that this trainer wrote"
        )
    if not intact:
        raise _damaged(path, "the checksum does not match")
    return parse({**_decode(text, path), "weights": weights}, path)


class _Header(msgspec.Struct):
    """What the header of a safetensors file has beside the tensors."""

    metadata: dict[str, str] = msgspec.field(default_factory=dict, name="__metadata__")


def _header(data: bytes, path: Path) -> bytes:
    """The header, if it is within bounds."""
    length = int.from_bytes(data[:8], "little")
    if length > len(data) - 8:
        raise _damaged(path, "its header is longer than the file")
    if length > _HEADER_BYTES:
        raise CheckpointError(f"{path}: refused, for its header has {length:,} bytes")
    header = data[8 : 8 + length]
    if (tensors := header.count(b"data_offsets")) > _TENSORS:
        raise CheckpointError(f"{path}: refused, for it has {tensors:,} tensors")
    return header


def _decode(text: str, path: Path) -> dict[str, Any]:
    try:
        entries = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its description is not JSON ({error})") from error
    check_format(entries, path)
    return dict(entries)


def _sha256(text: str, weights: dict[str, Tensor]) -> str:
    """Checksum of a description and the tensors that it describes."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(weights):
        weight = weights[name]
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _damaged(path: Path, what: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"{path}: damaged ({what}); --checkpoint last takes the newest checkpoint of the run"
    )
