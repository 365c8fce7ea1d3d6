"""Values and combinations of a configuration that cannot work, refused before any work.

An error names the field, what was found and what is allowed.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NoReturn

from shardprep_trainer.config.fields import (
    AugmentConfig,
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    flatten,
)
from shardprep_trainer.errors import ConfigError

# PyTorch, NumPy and the files take integers of 64 bits.
_TOO_LARGE = 2**63

_AT_LEAST = {
    "data.cache_gb": 1e-6,
    "data.patience_seconds": 0,
    "data.segment_frames": 1,
    "data.batch_size": 1,
    "data.global_batch": 1,
    "data.lanes": 1,
    "data.window_shards": 1,
    "data.prefetch": 0,
    "data.max_corrupt": 0,
    "data.eval_frames": 1,
    "model.dim": 1,
    "model.layers": 1,
    "model.heads": 1,
    "model.head_dim": 1,
    "model.ff_dim": 1,
    "model.conv_expansion": 1,
    "model.kernel_size": 1,
    "model.dropout": 0,
    "model.stem_channels": 0,
    "augment.reverb": 0,
    "augment.channel": 0,
    "augment.channel_points": 1,
    "augment.babble": 0,
    "augment.noise": 0,
    "augment.time_masks": 0,
    "augment.time_width": 0,
    "augment.freq_masks": 0,
    "augment.freq_width": 0,
    "loss.margin_growth": 0,
    "optim.weight_decay": 0,
    "optim.warmup_steps": 0,
    "optim.clip_norm": 0,
    "train.total_steps": 1,
    "train.accumulate": 1,
    "train.valid_steps": 0,
    "train.log_steps": 1,
    "train.save_steps": 1,
    "train.max_skipped": 0,
    "train.keep": 1,
    "train.hang_seconds": 0,
    "train.average_decay": 0,
    "train.seed": 0,
}


def check(config: Config) -> None:
    """Refuse values and combinations that cannot work.

    Types and literal names are the parser's to check.

    Raises:
        ConfigError: Naming the field, what was found and what is allowed.
    """
    plain = config.name.isprintable() and "/" not in config.name
    if not plain or config.name in {"", ".", ".."}:
        _refuse("name", repr(config.name), "a plain folder name")
    for key, value in flatten(config.to_dict()).items():
        if isinstance(value, float) and not math.isfinite(value):
            _refuse(key, value, "a finite number")
        if isinstance(value, int) and value >= _TOO_LARGE:
            _refuse(key, value, "less than 2**63")
        if value is not None and key in _AT_LEAST and value < _AT_LEAST[key]:
            _refuse(key, value, f"{_AT_LEAST[key]} or more")
    _check_data(config.data)
    _check_model(config.model)
    _check_augment(config.augment)
    _check_loss(config.loss, config.model.classifier)
    train = config.train
    if config.optim.lr <= 0:
        _refuse("optim.lr", config.optim.lr, "more than 0")
    if train.average_decay >= 1:
        _refuse("train.average_decay", train.average_decay, "less than 1")
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


def _check_model(model: ModelConfig) -> None:
    if model.dropout >= 1:
        _refuse("model.dropout", model.dropout, "less than 1")
    if model.subsampling not in (1, 2):
        _refuse("model.subsampling", model.subsampling, "1 or 2")
    if model.embedding_dim is not None and model.embedding_dim < 1:
        _refuse("model.embedding_dim", model.embedding_dim, "1 or more, or null")
    if model.encoder == "conformer" and model.kernel_size % 2 == 0:
        _refuse("model.kernel_size", model.kernel_size, "an odd number")
    if model.encoder == "conformer" and model.ff_dim % model.dim:
        found = f"{model.ff_dim} with model.dim {model.dim}"
        _refuse("model.ff_dim", found, "a multiple of dim in a conformer")
    if model.encoder == "transformer" and model.heads * model.head_dim != model.dim:
        found = f"{model.head_dim} with model.heads {model.heads} and model.dim {model.dim}"
        _refuse("model.head_dim", found, "heads x head_dim = dim in a transformer")


def _check_augment(augment: AugmentConfig) -> None:
    for name in ("reverb", "babble", "noise"):
        if (share := getattr(augment, name)) > 1:
            _refuse(f"augment.{name}", share, "a share, 0 to 1")
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
    if loss.margin_growth > 1:
        _refuse("loss.margin_growth", loss.margin_growth, "a share, 0 to 1")
    if loss.margin is not None and not 0 <= loss.margin < 2:
        _refuse("loss.margin", loss.margin, "0 up to but not including 2, in units of the cosine")
    if loss.scale is not None and loss.scale <= 0:
        _refuse("loss.scale", loss.scale, "more than 0")


def _refuse(field_name: str, found: object, allowed: str) -> NoReturn:
    raise ConfigError(f"{field_name}: found {found}, allowed is {allowed}")
