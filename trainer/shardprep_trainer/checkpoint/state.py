"""A checkpoint as one value: what its model is, the weights, and what continuing the run takes.

Each reader of a checkpoint parses and checks it here, once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from torch import Tensor

from shardprep_trainer.config.checks import parse_config
from shardprep_trainer.config.fields import LONGEST_FRAMES, AtLeastZero, Config
from shardprep_trainer.config.scoring import Calibration, Thresholds
from shardprep_trainer.errors import CheckpointError, ConfigError

FORMAT = 2
"""Number of the format of checkpoints and models; version 0.1.0 wrote 1."""


class Best(msgspec.Struct, frozen=True):
    """The best validation so far; None before the first, and where a measure is not taken."""

    accuracy: float | None = None
    step: int | None = None
    eer: float | None = None


class Training(msgspec.Struct, frozen=True, kw_only=True):
    """What continuing a run takes beside its model, and the launch that it began with."""

    optimizer: dict[str, Any]
    scaler: dict[str, Any] | None
    """Of fp16; None at another precision."""
    loader: dict[str, Any]
    """The position in the data."""
    precision: str
    processes: int
    global_batch: int
    """Segments of a step over all processes."""
    launchers: list[str]
    """Identities of the launchers of all machines: what they start anew continues the run."""
    meter: list[float]
    """Sums since the last line of metrics."""
    raw: dict[str, Tensor] | None
    """The weights that are trained, where the weights of the model are an average of them."""


class TrainedOn(msgspec.Struct, frozen=True):
    """The size of the train split."""

    utterances: AtLeastZero
    frames: AtLeastZero


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """What the validation found that chose the model."""

    utterances: AtLeastZero
    """Utterances whose speaker the head knows."""
    accuracy: float | None
    """Share of them that were recognised; None where there are none."""
    trials: AtLeastZero
    eer: float | None
    """Equal error rate of the trials, 0 to 1; None without trials."""
    min_dcf: float | None
    new_speakers: bool
    """Whether the trials are of speakers whom train lacks."""


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """What a model is: all that predicting takes, less the weights."""

    step: AtLeastZero
    """Training steps behind the weights."""
    best: Best
    config: Config
    speakers: Annotated[tuple[str, ...], Meta(min_length=1)]
    """Names of the classes, by their numbers."""
    n_mels: Annotated[int, Meta(ge=1, lt=2**31)]
    """Mel bins of a frame."""
    fingerprint: str
    """Of the shards that it was trained on."""
    thresholds: Thresholds | None = None
    """Of cosines, by the trials of the validation that chose the model; None without trials."""
    calibration: Calibration | None = None
    """Of cosines, by the same trials."""
    features: dict[str, str | int | float | bool | None] | None = None
    """How the shards say that their features were made; None where they do not."""
    dtype: Literal["float16", "float32", "uint8"] = "float16"
    """What the shards store: rounding to it belongs to the recipe."""
    longest_frames: Annotated[int, Meta(ge=1, lt=2**31)] = LONGEST_FRAMES
    """Longer utterances are embedded in pieces [frames]."""
    trained_on: TrainedOn | None = None
    results: Results | None = None
    """None where the model was not validated."""

    def __post_init__(self) -> None:
        """Make sure that a name means one speaker."""
        if len(set(self.speakers)) != len(self.speakers):
            raise ValueError("a speaker occurs twice")


class Checkpoint(Description, frozen=True, kw_only=True):
    """A run at one of its steps."""

    weights: dict[str, Tensor]
    """Of the model itself, by the names of its `state_dict`."""
    training: Training | None = None
    """None where only the model was saved."""
    file: Path = Path()
    """Where it was read from, for errors to name."""


def to_plain(checkpoint: Checkpoint) -> dict[str, Any]:
    """The entries of a checkpoint as plain values and tensors, which `parse` reads back."""
    training = checkpoint.training
    return {
        **description(checkpoint),
        "weights": checkpoint.weights,
        "training": None if training is None else msgspec.structs.asdict(training),
    }


def description(of: Description) -> dict[str, Any]:
    """The entries of a description as plain values, as JSON has them."""
    names = Description.__struct_fields__
    return {name: msgspec.to_builtins(getattr(of, name)) for name in names}


def parse(entries: dict[str, Any], file: Path) -> Checkpoint:
    """Make a checkpoint of the entries that a file has, and check them.

    Raises:
        CheckpointError: An entry is missing or not of its kind, or the settings describe no model.
    """
    try:
        config = parse_config(entries.get("config"))
        return msgspec.convert({**entries, "config": config, "file": file}, Checkpoint)
    except ConfigError as error:
        raise unfit(file, "settings", error) from error
    except msgspec.ValidationError as error:
        raise CheckpointError(
            f"{file}: not as the trainer saves it ({brief(error)}); take another checkpoint, or "
            "the version of shardprep that wrote it"
        ) from error


def check_format(entries: object, file: Path) -> None:
    """Refuse what another version wrote.

    Raises:
        CheckpointError: Naming the format that was found and the one that was expected.
    """
    found = entries.get("format") if isinstance(entries, dict) else None
    if found != FORMAT:
        raise CheckpointError(
            f"{file}: checkpoint format {str(found)[:20]} found, {FORMAT} expected; train again, "
            "or use the version of shardprep that wrote it (0.1.0 wrote format 1)"
        )


def unfit(file: Path, what: str, error: Exception) -> CheckpointError:
    """The error that a part of a checkpoint does not fit its model."""
    return CheckpointError(
        f"{file}: the {what} in it do not fit its model ({brief(error)}); take another checkpoint, "
        "or the version of shardprep that wrote it"
    )


def brief(error: Exception) -> str:
    """What an error says, on one line and not too long."""
    return " ".join(str(error).split())[:200] or type(error).__name__
