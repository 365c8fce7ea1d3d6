"""Configuration: typed dataclasses with a meaning and a unit under every field.

Whatever does not fit is refused by `check`, before any work, with the field, what was found and
what is allowed. `trainer.options` reads these fields from YAML and from the command line.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml

from trainer.errors import ConfigError


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how much of it at once."""

    shards: str = "shards/"
    """Folder that `shardprep build` made."""
    segment_frames: int = 128
    """Length of a training crop [frames of 10 ms]."""
    batch_size: int = 32
    """Crops in a micro-batch of one process."""
    pad_value: float = -20.0
    """Fills what an utterance shorter than its crop leaves [log-mel]."""
    placement: Literal["auto", "host", "device"] = "auto"
    """Where the training split lies: read from the shards, or kept on the GPU where it fits."""
    order: Literal["global", "windowed"] = "global"
    """Shuffle everything, or within a window, for data larger than memory."""
    lanes: int = 8
    """Sequences of shards read side by side, with order windowed."""
    window_shards: int = 4
    """Shuffling window of each lane, with order windowed [shards]."""
    prefetch: int = 2
    """Batches that a thread prepares ahead."""
    eval_frames: int = 32768
    """Largest padded area of a batch of whole utterances [frames]; a longer one goes alone."""


@dataclass(frozen=True)
class ModelConfig:
    """The network; these are the arguments of `SpeakerModel`."""

    encoder: Literal["conformer", "transformer"] = "conformer"
    """Kind of block."""
    dim: int = 512
    """Width of the encoder and of the embedding."""
    layers: int = 1
    """Blocks."""
    heads: int = 8
    """Attention heads of a block."""
    head_dim: int = 64
    """Width of a head; in a transformer heads x head_dim is dim."""
    ff_dim: int = 2048
    """Inner width of the feed-forward modules."""
    conv_expansion: int = 2
    """Inner width of the Conformer's convolution module, as a multiple of dim."""
    kernel_size: int = 31
    """Length of the Conformer's depthwise convolution [frames], odd."""
    dropout: float = 0.1
    """Probability of dropping a value, 0 up to but not including 1."""
    pooling: Literal["mean", "self_attentive"] = "self_attentive"
    """How the frames become one embedding."""
    classifier: Literal["linear", "mlp", "cosine"] = "cosine"
    """Head over the embedding: one matrix, two with a ReLU between, or cosines."""


@dataclass(frozen=True)
class LossConfig:
    """What is minimised."""

    name: Literal["softmax", "am_softmax"] = "am_softmax"
    """Plain or additive-margin softmax; the latter goes with model.classifier cosine."""
    margin: float | None = 0.2
    """Margin of am_softmax [cosine]; null with softmax."""
    scale: float | None = 30.0
    """Scale of the cosines in am_softmax; null with softmax."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW: linear warm-up from 0, then half a cosine down to 0 at train.total_steps."""

    lr: float = 1e-3
    """Learning rate at the end of the warm-up."""
    weight_decay: float = 0.01
    """Decoupled weight decay, per step and unit of learning rate."""
    warmup_steps: int = 1000
    """Length of the warm-up [optimiser steps]; a tenth of the run where that is not longer."""
    clip_norm: float = 5.0
    """Largest norm of the whole gradient; 0 leaves it as it is."""


@dataclass(frozen=True)
class TrainConfig:
    """The course of a run; steps are optimiser steps."""

    runs: str = "runs"
    """Folder of the run folders; this run's is RUNS/NAME."""
    total_steps: int = 70000
    """Length of the run [steps]."""
    accumulate: int = 1
    """Micro-batches of a step."""
    valid_steps: int = 2000
    """Steps from one validation on whole utterances to the next; 0 never validates."""
    log_steps: int = 100
    """Steps from one line of metrics to the next."""
    save_steps: int = 2000
    """Steps from one checkpoint to the next; there is always one at the end."""
    max_skipped: int = 20
    """Steps in a row that may be skipped, as they are where the loss or the gradient is not a
    finite number; one more ends the run. fp16 takes up to 16 to find its scale [steps]."""
    keep: int = 2
    """Checkpoints kept, newest first; best.pt is kept besides."""
    stop_step: int | None = None
    """Save and leave after this step, as an interruption would; the schedule is unchanged."""
    seed: int = 0
    """Decides the initial weights, the order of the data and the dropout."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Trackers of `accelerate` to log to, beside metrics.jsonl; TensorBoard writes into the run."""


@dataclass(frozen=True)
class Config:
    """The whole of a run; every field can be given in YAML or as an option."""

    name: str = "boss"
    """Name of the run and of its folder."""
    data: DataConfig = field(default_factory=DataConfig)
    """Data (--data.FIELD)"""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Model (--model.FIELD)"""
    loss: LossConfig = field(default_factory=LossConfig)
    """Loss (--loss.FIELD)"""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser (--optim.FIELD)"""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Course of the run (--train.FIELD)"""

    @property
    def run(self) -> Path:
        """The run folder."""
        return Path(self.train.runs) / self.name

    def to_dict(self) -> dict[str, Any]:
        """The fields as nested plain values."""
        return asdict(self)

    def to_yaml(self) -> str:
        """The fields as YAML that `--config` reads back to an equal configuration."""
        text: str = yaml.safe_dump(self.to_dict(), sort_keys=False)
        return text


_PARTS = {
    "data": DataConfig,
    "model": ModelConfig,
    "loss": LossConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
}

# PyTorch, NumPy and the files take integers of 64 bits.
_TOO_LARGE = 2**63

_AT_LEAST = {
    "data.segment_frames": 1,
    "data.batch_size": 1,
    "data.lanes": 1,
    "data.window_shards": 1,
    "data.prefetch": 0,
    "data.eval_frames": 1,
    "model.dim": 1,
    "model.layers": 1,
    "model.heads": 1,
    "model.head_dim": 1,
    "model.ff_dim": 1,
    "model.conv_expansion": 1,
    "model.kernel_size": 1,
    "model.dropout": 0,
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
    "train.seed": 0,
}


def flatten(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of `Config.to_dict` by their dotted names, `{"optim.lr": 0.001, ...}`."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update({f"{key}.{name}": inner for name, inner in value.items()})
        else:
            flat[key] = value
    return flat


def config_from_dict(values: dict[str, Any]) -> Config:
    """Rebuild the configuration that `Config.to_dict` gave, as checkpoints keep it.

    Raises:
        ConfigError: A field is unknown or missing; another version of this package wrote it.
    """
    try:
        return Config(values["name"], **{key: kind(**values[key]) for key, kind in _PARTS.items()})
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"the saved configuration has other fields than this version of trainer: {error}"
        ) from error


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
        if key in _AT_LEAST and value < _AT_LEAST[key]:
            _refuse(key, value, f"{_AT_LEAST[key]} or more")
    _check_model(config.model)
    _check_loss(config.loss, config.model.classifier)
    train = config.train
    if config.optim.lr <= 0:
        _refuse("optim.lr", config.optim.lr, "more than 0")
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


def _check_model(model: ModelConfig) -> None:
    if model.dropout >= 1:
        _refuse("model.dropout", model.dropout, "less than 1")
    if model.encoder == "conformer" and model.kernel_size % 2 == 0:
        _refuse("model.kernel_size", model.kernel_size, "an odd number")
    if model.encoder == "conformer" and model.ff_dim % model.dim:
        found = f"{model.ff_dim} with model.dim {model.dim}"
        _refuse("model.ff_dim", found, "a multiple of dim in a conformer")
    if model.encoder == "transformer" and model.heads * model.head_dim != model.dim:
        found = f"{model.head_dim} with model.heads {model.heads} and model.dim {model.dim}"
        _refuse("model.head_dim", found, "heads x head_dim = dim in a transformer")


def _check_loss(loss: LossConfig, classifier: str) -> None:
    margin_softmax = loss.name == "am_softmax"
    if margin_softmax != (classifier == "cosine"):
        allowed = "cosine with loss.name am_softmax, linear or mlp with softmax"
        _refuse("model.classifier", f"{classifier} with loss.name {loss.name}", allowed)
    for key, value in (("loss.margin", loss.margin), ("loss.scale", loss.scale)):
        if (value is not None) != margin_softmax:
            found = f"{'null' if value is None else value} with loss.name {loss.name}"
            _refuse(key, found, "a number with am_softmax, null with softmax")
    if loss.margin is not None and not 0 <= loss.margin < 2:
        _refuse("loss.margin", loss.margin, "0 up to but not including 2, in units of the cosine")
    if loss.scale is not None and loss.scale <= 0:
        _refuse("loss.scale", loss.scale, "more than 0")


def _refuse(field_name: str, found: object, allowed: str) -> NoReturn:
    raise ConfigError(f"{field_name}: found {found}, allowed is {allowed}")
