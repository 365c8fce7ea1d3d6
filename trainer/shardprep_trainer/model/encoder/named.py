"""Encoders by name: the import of a class that the user named, and its first trial.

Axis legend: F mel bins.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from shardprep_trainer.config.encoders import may_import
from shardprep_trainer.errors import EncoderError, is_out_of_memory
from shardprep_trainer.model.encoder.check import check_attributes, try_encoder


def build_named(
    name: str, options: Mapping[str, Any], n_mels: int, named: Collection[str]
) -> nn.Module:
    """Build an encoder of the user's own, and try it on a tiny batch.

    Under `torch.device("meta")` the trial is left out, as nothing can be computed there.

    Args:
        name: package.module:Class.
        options: Of the class.
        n_mels: Mel bins F.
        named: Names of encoders that the user wrote; no other code is imported, except for what
            comes with the trainer.

    Raises:
        EncoderError: The user did not name it, or it cannot be imported or built, or its output
            is not that of an encoder.
    """
    if not may_import(name, named):
        raise EncoderError(
            f"model.encoder: {name} is code that does not come with shardprep, and is imported "
            "only where you name it yourself"
        )
    made = _class_of(name)
    encoder = _make(made, name, options, n_mels)
    check_attributes(encoder, f"model.encoder: {name}")
    if torch.get_default_device().type != "meta":
        # What cannot be built like this could not be opened after training.
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            _make(made, name, options, n_mels)
        try_encoder(encoder, n_mels, f"model.encoder: {name}")
    return encoder


def _class_of(name: str) -> type[nn.Module]:
    module, _, attribute = name.partition(":")
    try:
        home = importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = str(error.name)
        if module != missing and not module.startswith(f"{missing}."):
            raise EncoderError(
                f"model.encoder: {name}: the module {module} needs {missing}, which is missing"
            ) from error
        raise EncoderError(
            f"model.encoder: {name}: there is no module {missing}; install its package, or name "
            f"the folder that holds {module.partition('.')[0]}: PYTHONPATH=FOLDER"
        ) from error
    # Of any kind: it is the user's code.
    except Exception as error:
        raise EncoderError(
            f"model.encoder: {name}: importing {module} failed ({_said(error)})"
        ) from error
    found = getattr(home, attribute, None)
    if found is None:
        raise EncoderError(f"model.encoder: {name}: the module {module} has no {attribute}")
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise EncoderError(
            f"model.encoder: {name}: found {type(found).__name__} {attribute}, allowed is a class "
            "that derives from torch.nn.Module"
        )
    return found


def _make(made: type[nn.Module], name: str, options: Mapping[str, Any], n_mels: int) -> nn.Module:
    try:
        inspect.signature(made).bind(n_mels, **options)
    except TypeError as error:
        raise EncoderError(
            f"model.encoder_options: {name} does not take them ({error}); it is "
            f"{made.__name__}{inspect.signature(made)}, whose first argument is the number of mel "
            "bins. --model.encoder_options '{OPTION: VALUE}' replaces all options of a recipe"
        ) from error
    try:
        return made(n_mels, **options)
    # Of any kind: it is the user's code.
    except Exception as error:
        if is_out_of_memory(error):
            raise
        where = torch.get_default_device().type
        how = ' under torch.device("meta"), where tensors have no values' if where == "meta" else ""
        given = str(dict(options))[:200]
        raise EncoderError(
            f"model.encoder: {name} cannot be built{how} ({_said(error)}); it is "
            f"{made.__name__}{inspect.signature(made)}, with model.encoder_options {given}"
        ) from error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
