"""The weights of a checkpoint, put into a model."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.modules.module as of
from torch import Tensor, nn

from shardprep import other_features
from shardprep_trainer.checkpoint.state import Checkpoint, unfit
from shardprep_trainer.config.encoders import may_import
from shardprep_trainer.errors import CheckpointError, ConfigError, EncoderError
from shardprep_trainer.model.build import build_model
from shardprep_trainer.model.model import SpeakerNetwork

# Layers that are made for a tensor of a model, and beside them: a Conformer makes some four.
_LAYERS_A_TENSOR, _LAYERS = 16, 256
# Of tables that a model holds and does not save.
_UNSAVED_BYTES = 2**26


def load_weights(model: nn.Module, weights: dict[str, Tensor], file: Path) -> None:
    """Put weights into a model; `file` is named in errors.

    Raises:
        CheckpointError: They are not those of such a model.
    """
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise unfit(file, "weights", error) from error


def load_model(checkpoint: Checkpoint, encoders: Collection[str] = ()) -> SpeakerNetwork:
    """Build the model that a checkpoint describes, with its weights.

    The shapes are compared before memory is taken for a model.

    Args:
        checkpoint: What to build.
        encoders: Names of encoders that the user wrote; code that a checkpoint names is imported
            only if it comes with the trainer, or is one of them.

    Raises:
        CheckpointError: Its configuration describes no model, or not that of its weights, or its
            encoder is not to be imported, or cannot be.
    """
    config, file = checkpoint.config.model, checkpoint.file
    sizes = checkpoint.n_mels, len(checkpoint.speakers)
    if not may_import(config.encoder, encoders):
        raise CheckpointError(
            f"{file}: its encoder is {config.encoder}, code that does not come with shardprep; a "
            "checkpoint may be a stranger's, so nothing was imported. If you trust that code, name "
            f'it: --encoder {config.encoder}, or encoder="{config.encoder}" in Python'
        )
    found = {name: tuple(weight.shape) for name, weight in checkpoint.weights.items()}
    try:
        with torch.device("meta"), _few_layers(len(found)):
            described = build_model(config, *sizes, encoders)
        shapes = {name: tuple(weight.shape) for name, weight in described.state_dict().items()}
        if missing := found.keys() ^ shapes.keys():
            raise ValueError(f"{len(missing)} tensors are missing, or not of this model")
        for name, shape in shapes.items():
            if found[name] != shape:
                raise ValueError(f"{name}: found {found[name]}, expected {shape}")
        _check_buffers(described, checkpoint.weights)
        model = build_model(config, *sizes, encoders)
    except EncoderError as error:
        raise CheckpointError(f"{file}: {error}") from error
    except (RuntimeError, TypeError, ValueError, ArithmeticError) as error:
        raise unfit(file, "weights", error) from error
    load_weights(model, checkpoint.weights, file)
    return model


@contextmanager
def _few_layers(tensors: int) -> Iterator[None]:
    """Let this thread make only as many layers and weights as a model of so many tensors may have.

    Even a layer without weights takes memory, and so does a weight on the device meta.
    """
    most, own = _LAYERS_A_TENSOR * tensors + _LAYERS, threading.get_ident()
    count = itertools.count(1)

    def register(module: nn.Module, name: str, value: object) -> None:
        if threading.get_ident() == own and next(count) > most:
            raise ValueError(f"its settings ask for more layers than {tensors} tensors are of")

    hooks = [
        of.register_module_module_registration_hook(register),
        of.register_module_parameter_registration_hook(register),
        of.register_module_buffer_registration_hook(register),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _check_buffers(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Refuse a model that holds much more than its weights: tables that are not saved."""
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    given = sum(tensor.nbytes for tensor in weights.values())
    if held > 4 * given + _UNSAVED_BYTES:
        raise ValueError(f"the model takes {held:,} bytes, its weights have {given:,}")


def start_from(
    model: nn.Module, checkpoint: Checkpoint, speakers: tuple[str, ...]
) -> tuple[str, ...]:
    """Put the weights of another run into a model, for fine-tuning.

    The head may be of other speakers. It then has the weights of the speakers whom both know, by
    their names, and keeps its own for the others.

    Args:
        model: The model.
        checkpoint: Of the other run.
        speakers: The speakers of the model's head.

    Returns:
        The speakers whom the other run does not know.

    Raises:
        CheckpointError: The other run has another model.
    """
    weights = dict(checkpoint.weights)
    if checkpoint.speakers != speakers:
        rows = {name: row for row, name in enumerate(checkpoint.speakers)}
        both = [(own, rows[name]) for own, name in enumerate(speakers) if name in rows]
        fresh = model.state_dict()
        # The last layer of the head has a row for each speaker; others may have as many rows.
        last = [name for name in fresh if name.startswith("classifier.")][-1].rpartition(".")[0]
        for name, own in fresh.items():
            found = weights.get(name)
            if (
                name.rpartition(".")[0] == last
                and found is not None
                and found.shape == (len(checkpoint.speakers), *own.shape[1:])
                and own.shape[:1] == (len(speakers),)
            ):
                weights[name] = own.clone()
                for here, there in both:
                    weights[name][here] = found[there].to(own.dtype)
    try:
        load_weights(model, weights, checkpoint.file)
    except CheckpointError as error:
        folder = checkpoint.file.parent
        # That of a model has the options of its run, that of step checkpoints has not.
        place = folder if (folder / "config.yaml").is_file() else folder.parent
        raise CheckpointError(
            f"{error}; train.start_from takes a model of the recipe and sizes of this run: give "
            f"--config {place}"
        ) from error
    known = set(checkpoint.speakers)
    return tuple(name for name in speakers if name not in known)


def check_features(checkpoint: Checkpoint, features: dict[str, Any] | None, where: str) -> None:
    """Make sure that the shards have features like those that a model was trained on.

    Args:
        checkpoint: The model.
        features: Those of the shards, where they are known.
        where: The shards, for the error to name.

    Raises:
        ConfigError: They are known to be others.
    """
    expected = checkpoint.features
    if features is None or expected is None or features == expected:
        return
    raise ConfigError(
        f"train.start_from: {where} has other features than {checkpoint.file} was trained on "
        f"({other_features(features, expected)}); build it with "
        f"--features-from {checkpoint.file.parent}"
    )
