"""Values and combinations of a configuration that cannot work, refused before any work.

An error names the field, what was found and what is allowed.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any, NoReturn

import msgspec

from shardprep_trainer.config.encoders import ALLOWED, BLOCKS, is_name
from shardprep_trainer.config.fields import (
    LARGEST,
    PARTS,
    AugmentConfig,
    Config,
    DataConfig,
    Inner,
    LossConfig,
    ModelConfig,
    Option,
    flatten,
)
from shardprep_trainer.errors import ConfigError

# What msgspec says of a bound, and how we say it.
_BOUND = re.compile(r"Expected `[^`]*` (>=|<=|>|<) (\S+)")
_ALLOWED = {">=": "{} or more", "<=": "{} or less", ">": "more than {}", "<": "less than {}"}


def parse_config(values: Any) -> Config:
    """Make the configuration of nested plain values, as `Config.to_dict` gives them, and check it.

    Raises:
        ConfigError: A field is unknown, of another type or out of its bounds, or values do not go
            together; names the field, what was found and what is allowed.
    """
    try:
        config = msgspec.convert(values, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(_explain(str(error), values)) from error
    # msgspec passes over names that it does not know, and takes a default for those that lack.
    known = flatten(config.to_dict())
    missing = [part for part in ("name", *PARTS) if part not in values]
    unknown = [str(key) for key in flatten(values) if key not in known]
    if missing or unknown:
        raise ConfigError(f"{', '.join(missing + unknown)}: missing, or not a field")
    _check(config)
    return config


def _explain(problem: str, values: Any) -> str:
    """What msgspec found wrong, in our words: the field, what was found and what is allowed."""
    what, _, path = problem.partition(" - at `$")
    names = path.strip("`.").split(".") if path else []
    found = values
    for name in names:
        found = found.get(name) if isinstance(found, dict) else found
    allowed = what[:1].lower() + what[1:]
    if bound := _BOUND.fullmatch(what):
        limit = "2**63" if bound[2] == str(LARGEST) else f"{float(bound[2]):g}"
        sign = "<" if bound[2] == str(LARGEST) else bound[1]
        allowed = _ALLOWED[sign].format(limit)
        if flatten(Config().to_dict()).get(".".join(names)) is None:
            allowed += ", or null"
    elif what.startswith("Expected `object`"):
        allowed = "a mapping of its fields"
    return (
        f"{'.'.join(names) or 'the configuration'}: found {str(found)[:80]}, allowed is {allowed}"
    )


def _check(config: Config) -> None:
    """Refuse values that do not go together, which types and bounds cannot say."""
    plain = config.name.isprintable() and "/" not in config.name
    if not plain or config.name in {"", ".", ".."}:
        _refuse("name", repr(config.name), "a plain folder name")
    for key, value in flatten(config.to_dict()).items():
        if isinstance(value, float) and not math.isfinite(value):
            _refuse(key, value, "a finite number")
    _check_data(config.data)
    _check_model(config.model)
    _check_augment(config.augment)
    _check_loss(config.loss, config.model.classifier)
    train = config.train
    if train.stop_step is not None and not 1 <= train.stop_step <= train.total_steps:
        allowed = f"null, or 1 to train.total_steps, {train.total_steps}"
        _refuse("train.stop_step", train.stop_step, allowed)


def shorten_warmup(config: Config) -> Config:
    """Make a warm-up that is not shorter than the run a tenth of it, rounded down.

    So a recipe can be tried for a few steps without another option. Checked configurations that
    are not concerned come back as they are.
    """
    total = config.train.total_steps
    if config.optim.warmup_steps < total:
        return config
    return replace(config, optim=replace(config.optim, warmup_steps=total // 10))


def _check_data(data: DataConfig) -> None:
    if data.on_corrupt == "skip" and data.verify_reads == "never":
        _refuse("data.verify_reads", "never", "once or always with data.on_corrupt skip")
    if data.order == "windowed" and (data.global_batch or 0) % data.lanes:
        allowed = f"with data.order windowed a multiple of data.lanes, {data.lanes}"
        _refuse("data.global_batch", data.global_batch, allowed)
    if not data.places:
        _refuse("data.shards", list(data.places), "the folder or URL of one set, or a list of them")
    if data.shares is not None and len(data.shares) != len(data.places):
        allowed = f"a share for each set of data.shards, {len(data.places)}"
        _refuse("data.shares", data.shares, allowed)
    if data.order == "windowed" and (data.shares or data.balance):
        _refuse("data.order", "windowed", "global with data.shares or data.balance")


def _check_model(model: ModelConfig) -> None:
    if not is_name(model.encoder):
        _refuse("model.encoder", repr(model.encoder)[:80], ALLOWED)
    for name, value in model.encoder_options.items():
        if not name.isidentifier():
            _refuse(
                "model.encoder_options", repr(name)[:80], "names of options, as Python has them"
            )
        if not all(map(math.isfinite, _floats(value))):
            _refuse(f"model.encoder_options.{name}", value, "finite numbers")
    if model.encoder in BLOCKS and model.encoder_options:
        allowed = f"none for a {model.encoder}, which model.dim, model.layers and others describe"
        _refuse("model.encoder_options", ", ".join(model.encoder_options)[:80], allowed)
    if model.encoder == "conformer" and model.kernel_size % 2 == 0:
        _refuse("model.kernel_size", model.kernel_size, "an odd number")
    if model.encoder == "conformer" and model.ff_dim % model.dim:
        found = f"{model.ff_dim} with model.dim {model.dim}"
        _refuse("model.ff_dim", found, "a multiple of dim in a conformer")
    if model.encoder == "transformer" and model.heads * model.head_dim != model.dim:
        found = f"{model.head_dim} with model.heads {model.heads} and model.dim {model.dim}"
        _refuse("model.head_dim", found, "heads x head_dim = dim in a transformer")


def _floats(value: Option | Inner) -> list[float]:
    """The floating-point numbers in a value."""
    if isinstance(value, list):
        return [number for inner in value for number in _floats(inner)]
    return [value] if isinstance(value, float) else []


def _check_augment(augment: AugmentConfig) -> None:
    for name in ("reverb_seconds", "babble_snr", "noise_snr"):
        bounds = getattr(augment, name)
        if not all(map(math.isfinite, bounds)) or bounds[0] > bounds[1]:
            _refuse(f"augment.{name}", list(bounds), "two finite numbers, the lower one first")
    if augment.reverb_seconds[0] <= 0:
        _refuse("augment.reverb_seconds", list(augment.reverb_seconds), "times above 0")


def _check_loss(loss: LossConfig, classifier: str) -> None:
    margin_softmax = loss.name != "softmax"
    if margin_softmax != (classifier == "cosine"):
        allowed = "cosine with loss.name am_softmax or aam_softmax, linear or mlp with softmax"
        _refuse("model.classifier", f"{classifier} with loss.name {loss.name}", allowed)
    for key, value in (("loss.margin", loss.margin), ("loss.scale", loss.scale)):
        if (value is not None) != margin_softmax:
            found = f"{'null' if value is None else value} with loss.name {loss.name}"
            _refuse(key, found, "a number with am_softmax or aam_softmax, null with softmax")


def _refuse(field_name: str, found: object, allowed: str) -> NoReturn:
    raise ConfigError(f"{field_name}: found {found}, allowed is {allowed}")
