"""Configuration: typed dataclasses with a meaning, a unit and bounds for every field.

`command_line` reads these fields from YAML and from the command line; `checks` says which values
go together. jsonargparse makes the command line from the types, and msgspec checks the bounds.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from msgspec import Meta

# PyTorch, NumPy and the files take integers of 64 bits.
LARGEST = 2**63 - 1
LONGEST_FRAMES = 8192
"""Longer utterances are embedded in pieces: `evaluation/pieces.py` has the rule [frames]."""
AtLeastOne = Annotated[int, Meta(ge=1, le=LARGEST)]
AtLeastZero = Annotated[int, Meta(ge=0, le=LARGEST)]
NotNegative = Annotated[float, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
BelowOne = Annotated[float, Meta(ge=0, lt=1)]
Plain = bool | int | float | str | None
# Not Any: for that, the parser of the command line imports what a value names as its class.
Inner = Plain | list[Plain]
Option = Plain | list[Inner]


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how much of it at once."""

    shards: list[str] | str = "shards/"
    """Folder that `shardprep build` made, or the URL of one, such as s3://BUCKET/shards; a list of
    several, such as [a/, b/], is read as one set."""
    shares: list[Positive] | None = None
    """How often the segments of each set in data.shards come, such as [3, 1]; each set then comes
    in epochs of its own. null reads all sets as one."""
    balance: Literal["speaker"] | None = None
    """speaker lets the segments of every speaker come equally often, with data.shares within each
    set; null lets every utterance come equally often."""
    cache_folder: str | None = None
    """Where shards behind a URL are kept, on a disk of this machine; null for what the variable
    SHARDPREP_CACHE names, or a folder among the user's caches."""
    cache_gb: Annotated[float, Meta(ge=1e-6)] | None = None
    """Most that is kept there [10^9 bytes]; null for SHARDPREP_CACHE_GB, or half of the free
    disk."""
    patience_seconds: NotNegative = 300.0
    """Time for which a store may give no answer before that ends the run [s]."""
    segment_frames: AtLeastOne = 128
    """Length of a training segment [frames of 10 ms]."""
    batch_size: AtLeastOne = 32
    """Segments in a micro-batch of one process."""
    global_batch: AtLeastOne | None = None
    """Segments of a micro-batch over all processes; replaces data.batch_size, and stays the same
    when processes come or go."""
    short: Literal["pad", "repeat"] = "pad"
    """What fills a segment of a shorter utterance: data.pad_value, which the model is told to leave
    out; or the utterance again from its beginning, so that no step of training needs a mask."""
    pad_value: float = -20.0
    """Fills what an utterance shorter than its segment, or than others of its batch, leaves
    [log-mel]."""
    placement: Literal["auto", "host", "device"] = "auto"
    """Where the training split lies: read from the shards, or kept on the GPU where it fits."""
    order: Literal["global", "windowed"] = "global"
    """Shuffle everything, or within a window, for data larger than memory."""
    lanes: AtLeastOne = 8
    """Sequences of shards read side by side, with order windowed."""
    window_shards: AtLeastOne = 4
    """Shuffling window of each lane, with order windowed [shards]."""
    prefetch: AtLeastZero = 2
    """Batches that a thread prepares ahead."""
    verify_reads: Literal["never", "once", "always"] = "once"
    """Whether the crc32 of an utterance is checked before its segments are used."""
    on_corrupt: Literal["raise", "skip"] = "raise"
    """What a damaged utterance leads to: the end of the run, or it is left out; skip goes with a
    data.verify_reads other than never."""
    max_corrupt: AtLeastZero = 100
    """Damaged utterances that skip leaves out on one process; one more ends the run."""
    eval_frames: AtLeastOne = 32768
    """Largest padded area of a batch of whole utterances [frames], on a CPU 4,096 at most; a longer
    one goes alone."""

    @property
    def places(self) -> tuple[str, ...]:
        """Folder or URL of each set."""
        return (self.shards,) if isinstance(self.shards, str) else tuple(self.shards)

    @property
    def where(self) -> str:
        """The places of the sets, as a text."""
        return " and ".join(self.places)


@dataclass(frozen=True)
class ModelConfig:
    """The network, as `model.build` makes it."""

    encoder: str = "conformer"
    """Blocks, conformer or transformer, by the fields below; or a class of one's own that maps mel
    frames to frames, package.module:Class, which is imported (docs/training.md)."""
    encoder_options: dict[str, Option] = field(default_factory=dict)
    """Options of such a class, by their names."""
    dim: AtLeastOne = 512
    """Width of the blocks, and of the layer within the pooling that weighs frames."""
    layers: AtLeastOne = 1
    """Blocks."""
    heads: AtLeastOne = 8
    """Attention heads of a block."""
    head_dim: AtLeastOne = 64
    """Width of a head; in a transformer heads x head_dim is dim."""
    ff_dim: AtLeastOne = 2048
    """Inner width of the feed-forward modules."""
    conv_expansion: AtLeastOne = 2
    """Inner width of the Conformer's convolution module, as a multiple of dim."""
    kernel_size: AtLeastOne = 31
    """Length of the Conformer's depthwise convolution [frames], odd."""
    dropout: BelowOne = 0.1
    """Probability of dropping a value, 0 up to but not including 1."""
    pooling: Literal["mean", "self_attentive", "attentive_statistics"] = "self_attentive"
    """How the frames become one embedding."""
    center: bool = False
    """Subtract the mean frame of each utterance, and with it a fixed filter of the channel."""
    subsampling: Annotated[int, Meta(ge=1, le=2)] = 1
    """Rate of the frames in the encoder: 1 for all, 2 for a front end that halves it."""
    stem_channels: AtLeastZero = 0
    """Channels of three convolutions over frames and bins before the encoder; 0 for none."""
    concat: bool = False
    """Pool the outputs of all blocks side by side, not only those of the last."""
    embedding_dim: AtLeastOne | None = None
    """Width of the embedding, by BatchNorm and a matrix; null for that of what is pooled."""
    classifier: Literal["linear", "mlp", "cosine"] = "cosine"
    """Head over the embedding: one matrix, two with a ReLU between, or cosines."""


@dataclass(frozen=True)
class AugmentConfig:
    """Changes to training segments, on the device; a share of 0 leaves a change out."""

    reverb: Share = 0.0
    """Segments that get the tail of a room [share]."""
    reverb_seconds: tuple[float, float] = (0.1, 0.8)
    """Shortest and longest time in which the tail falls by 60 dB [s]."""
    channel: NotNegative = 0.0
    """Deviation of a smooth curve over mel bins that is added to every segment [log-mel]."""
    channel_points: AtLeastOne = 6
    """Points that the curve runs through."""
    babble: Share = 0.0
    """Segments that one to three other segments of the batch are added to [share]."""
    babble_snr: tuple[float, float] = (5.0, 20.0)
    """Lowest and highest ratio of the powers [dB]."""
    noise: Share = 0.0
    """Segments that get noise with a smooth spectrum [share]."""
    noise_snr: tuple[float, float] = (5.0, 20.0)
    """Lowest and highest ratio of the powers [dB]."""
    time_masks: AtLeastZero = 0
    """Spans of frames that are hidden (SpecAugment)."""
    time_width: AtLeastZero = 10
    """Longest of them [frames]."""
    freq_masks: AtLeastZero = 0
    """Spans of mel bins that are hidden (SpecAugment)."""
    freq_width: AtLeastZero = 6
    """Longest of them [mel bins]."""


@dataclass(frozen=True)
class LossConfig:
    """What is minimised."""

    name: Literal["softmax", "am_softmax", "aam_softmax"] = "am_softmax"
    """Plain, additive-margin or additive-angular-margin softmax; a margin goes with
    model.classifier cosine."""
    margin: Annotated[float, Meta(ge=0, lt=2)] | None = 0.2
    """Margin of am_softmax [cosine] or aam_softmax [rad]; null with softmax."""
    scale: Positive | None = 30.0
    """Scale of the cosines; null with softmax."""
    margin_growth: Share = 0.0
    """Share of the run over which the margin grows from 0 in a straight line."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser; its rate rises from 0, then falls along half a cosine to 0 at the end."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon for the matrices within the network and adamw for the rest."""
    lr: Positive = 1e-3
    """Learning rate at the end of the warm-up."""
    weight_decay: NotNegative = 0.01
    """Decoupled weight decay, per step and unit of learning rate."""
    warmup_steps: AtLeastZero = 1000
    """Length of the warm-up [optimiser steps]; a tenth of the run where that is not longer."""
    clip_norm: NotNegative = 5.0
    """Largest norm of the whole gradient; 0 leaves it as it is."""


@dataclass(frozen=True)
class TrainConfig:
    """The course of a run; steps are optimiser steps."""

    runs: str = "runs"
    """Folder of the run folders; this run's is RUNS/NAME."""
    total_steps: AtLeastOne = 70000
    """Length of the run [steps]."""
    accumulate: AtLeastOne = 1
    """Micro-batches of a step."""
    valid_steps: AtLeastZero = 2000
    """Steps from one validation on whole utterances to the next; 0 never validates."""
    valid_trials: AtLeastZero = 10000
    """Trials of a validation, half of them of one speaker: among speakers of val whom train lacks
    if there are such, and then their equal error rate chooses the best model; 0 for none."""
    log_steps: AtLeastOne = 100
    """Steps from one line of metrics to the next."""
    save_steps: AtLeastOne = 2000
    """Steps from one checkpoint to the next; there is always one at the end."""
    tf32: bool = True
    """Let a GPU multiply float32 matrices in TensorFloat-32, but for those of the cosine head."""
    compile: Literal["auto", "off", "default", "graphs"] = "auto"
    """How a step is computed: off runs kernel by kernel, default compiles it with torch.compile,
    graphs also records it in CUDA graphs. auto compiles on a GPU, in runs of 2,000 steps or more:
    small batches with graphs, others with default."""
    sync_batchnorm: bool = False
    """BatchNorm statistics over the batches of all processes; otherwise each sees its own."""
    max_skipped: AtLeastZero = 20
    """Steps in a row that may be skipped, as they are where the loss or the gradient is not a
    finite number; one more ends the run. fp16 takes up to 16 to find its scale [steps]."""
    keep: AtLeastOne = 2
    """Checkpoints kept, newest first; the best model is kept besides."""
    stop_step: int | None = None
    """Save and leave after this step, as an interruption would; the schedule is unchanged."""
    hang_seconds: NotNegative = 1800.0
    """Time without a step, on any process, after which the run ends with a report of what each
    process was doing; 0 waits for ever [s]."""
    average_decay: BelowOne = 0.0
    """Share of the moving average of the weights that a step keeps; the average is validated and
    saved for prediction. 0 keeps none."""
    start_from: str | None = None
    """Run folder, model folder or checkpoint whose weights a new run begins with, for fine-tuning;
    null for random weights."""
    seed: AtLeastZero = 0
    """Decides the initial weights, the order of the data and the dropout."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Trackers of `accelerate` to log to, beside metrics.jsonl; TensorBoard writes into the run."""


Backend = Literal["head", "wccn"]


@dataclass(frozen=True)
class PredictConfig:
    """How predict and score name a speaker; training and its validation use the head."""

    backend: Backend = "head"
    """By the head of the model, or by the nearest mean embedding of the training speakers, after
    within-class covariance normalisation (`shardprep_trainer.evaluation.wccn`)."""


@dataclass(frozen=True)
class Config:
    """The whole of a run; every field can be given in YAML or as an option."""

    name: str = "boss"
    """Name of the run and of its folder."""
    data: DataConfig = field(default_factory=DataConfig)
    """Data (--data.FIELD)"""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Model (--model.FIELD)"""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Augmentation (--augment.FIELD)"""
    loss: LossConfig = field(default_factory=LossConfig)
    """Loss (--loss.FIELD)"""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser (--optim.FIELD)"""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Course of the run (--train.FIELD)"""
    predict: PredictConfig = field(default_factory=PredictConfig)
    """Prediction (--predict.FIELD)"""

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


PARTS = tuple(part.name for part in fields(Config) if part.name != "name")


def flatten(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of `Config.to_dict` by their dotted names, `{"optim.lr": 0.001, ...}`."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update({f"{key}.{name}": inner for name, inner in value.items()})
        else:
            flat[key] = value
    return flat
