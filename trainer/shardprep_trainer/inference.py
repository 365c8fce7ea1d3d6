"""From the options of a command to models and the shards that they are used on, opened."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from shardprep import OpenShards, ShardprepError
from shardprep_trainer.checkpoint.files import load
from shardprep_trainer.checkpoint.find import find_checkpoint
from shardprep_trainer.checkpoint.open_shards import open_shards_of
from shardprep_trainer.checkpoint.state import Checkpoint
from shardprep_trainer.checkpoint.weights import load_model
from shardprep_trainer.config.fields import Backend
from shardprep_trainer.errors import ConfigError, PredictionError
from shardprep_trainer.evaluation.labels import read_left_out
from shardprep_trainer.evaluation.views import Views
from shardprep_trainer.model import cpu_kernels as cpu
from shardprep_trainer.pretrained.on_shards import Inference, Model


@dataclass(frozen=True)
class ModelOptions:
    """The options of `commands.model_options`, as they were given."""

    runs: Sequence[Path]
    shards: Sequence[str]
    split: str
    checkpoint: str
    max_frames: int
    tta: int
    tta_frames: int
    backend: Backend | None = "head"
    """None is the recipe's."""
    encoders: Sequence[str] = ()
    """Encoders of the user's own that may be imported."""


def open_inference(
    options: ModelOptions, tell: Callable[[str], None], may_be_empty: bool = False
) -> Inference:
    """Load the models, open the shards, and tell what a user should know of them.

    Args:
        options: What to open.
        tell: Shows a line of text to the user.
        may_be_empty: Whether the shards may lack the split test, where all its entries were left
            out by the build.

    Raises:
        ConfigError: A model is named twice, or it is unclear which shards are meant.
        CheckpointError: A checkpoint is missing or damaged, or its parts do not fit together.
        PredictionError: The shards have another number of mel bins, or nothing in the split.
        ShardprepError: The shards cannot be read.
    """
    checkpoints = [load(file) for file in find_files(options.runs, options.checkpoint)]
    shards = _open_shards(checkpoints, options.shards, tell)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for checkpoint in checkpoints:
        tell(f"{checkpoint.file}, after {checkpoint.step:,} steps, on {device.type}")
    for checkpoint in checkpoints:
        if shards.n_mels != checkpoint.n_mels:
            name = "the model" if len(checkpoints) == 1 else str(checkpoint.file)
            raise PredictionError(
                f"{shards.where} has {shards.n_mels} mel bins a frame, but {name} was trained on "
                f"{checkpoint.n_mels}; build shards from features like those it was trained on"
            )
    left_out = read_left_out(shards)
    if left_out is not None:
        tell(f"note: {left_out.note}")
    inference = Inference(
        models=tuple(_open_model(checkpoint, options, device) for checkpoint in checkpoints),
        shards=shards,
        left_out=left_out,
        device=device,
        max_frames=cpu.largest_batch(options.max_frames, device),
        pad_value=checkpoints[0].config.data.pad_value,
        tell=tell,
    )
    if not (may_be_empty and inference.lacks_test):
        part = inference.split(options.split)
        for longest in sorted({checkpoint.longest_frames for checkpoint in checkpoints}):
            if cut := int((part.frames > longest).sum()):
                tell(
                    f"note: {cut:,} utterances of {part.name} are longer than {longest:,} frames; "
                    "each is embedded in pieces, whose mean counts"
                )
    backends = {model.backend for model in inference.models} - {"head"}
    for backend in backends:
        who = f"those of the train split of {shards.where}, which is embedded first"
        tell(f"note: speakers are named by --backend {backend}: {who}")
    if backends and options.split == "train":
        tell(
            "note: the accuracy on train says nothing: speakers are known by these very utterances"
        )
    return inference


def find_files(runs: Sequence[Path], choice: str) -> list[Path]:
    """The files of one or several models, in the order of their paths.

    Args:
        runs: See `find_checkpoint`.
        choice: Which of each; see there.

    Raises:
        ConfigError: A model is named twice, or the choice is one file for several runs.
        CheckpointError: There is no such file.
    """
    if len(runs) > 1 and choice not in ("best", "last"):
        raise ConfigError(
            f"--checkpoint {choice} is one file, but {len(runs)} models are named: name the file "
            "in the place of its run"
        )
    found = sorted(find_checkpoint(run, choice) for run in runs)
    seen: dict[Path, Path] = {}
    for file in found:
        if (other := seen.setdefault(file.resolve(), file)) is not file:
            also = "" if other == file else f" ({other} is the same file)"
            raise ConfigError(f"{file}: named twice{also}; name each model once")
    return found


def _open_shards(
    checkpoints: Sequence[Checkpoint], places: Sequence[str], tell: Callable[[str], None]
) -> OpenShards:
    trained_on = {", ".join(checkpoint.config.data.places) for checkpoint in checkpoints}
    if not places and len(trained_on) > 1:
        raise ConfigError(
            f"the models were trained on different shards ({'; '.join(sorted(trained_on))}): name "
            "those to read with --shards"
        )
    try:
        return open_shards_of(checkpoints[0].config.data, places)
    except ShardprepError:
        if not places:
            tell("note: these are the shards that the model was trained on; --shards names others")
        raise


def _open_model(checkpoint: Checkpoint, options: ModelOptions, device: torch.device) -> Model:
    config = checkpoint.config
    frames = options.tta_frames or config.data.segment_frames
    network = load_model(checkpoint, options.encoders).to(device)
    return Model(
        file=checkpoint.file,
        step=checkpoint.step,
        classes=checkpoint.speakers,
        is_cosine=config.model.classifier == "cosine",
        backend=options.backend or config.predict.backend,
        views=Views(network, options.tta, frames, checkpoint.longest_frames).eval(),
        thresholds=checkpoint.thresholds,
        calibration=checkpoint.calibration,
    )
