"""A trained model and the shards that it is used on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from shardprep import OpenShards, ShardprepError, Split, UtteranceLoader
from shardprep_trainer.checkpoint.files import load
from shardprep_trainer.checkpoint.find import find_checkpoint
from shardprep_trainer.checkpoint.open_shards import open_shards_of
from shardprep_trainer.checkpoint.weights import load_model
from shardprep_trainer.config.fields import Backend
from shardprep_trainer.config.scoring import Calibration, Thresholds
from shardprep_trainer.errors import PredictionError
from shardprep_trainer.evaluation.accuracy import Collected, Labels, collect, grade
from shardprep_trainer.evaluation.labels import LeftOut, read_left_out
from shardprep_trainer.evaluation.views import Views
from shardprep_trainer.evaluation.wccn import Wccn


@dataclass(frozen=True)
class ModelOptions:
    """The options of `commands.model_options`, as they were given."""

    run: Path
    shards: Sequence[str]
    split: str
    checkpoint: str
    max_frames: int
    tta: int
    tta_frames: int
    backend: Backend | None = "head"
    """None is the recipe's."""


@dataclass(frozen=True)
class Inference:
    """A model on its device, and the shards that it is used on."""

    file: Path
    """The checkpoint."""
    step: int
    """Training steps behind the checkpoint."""
    classes: tuple[str, ...]
    """Names of the model's classes; those of the shards may be others."""
    backend: Backend
    """What names speakers."""
    views: Views
    """The model, in evaluation mode."""
    shards: OpenShards
    left_out: LeftOut | None
    """What the build of the shards left out."""
    device: torch.device
    max_frames: int
    """Largest padded area of a batch [frames]."""
    pad_value: float
    """Fills padded frames [log-mel]."""
    thresholds: Thresholds | None = None
    """Of cosines, by the run's validation."""
    calibration: Calibration | None = None
    """Of cosines, by the run's validation."""

    def split(self, name: str) -> Split:
        """Open a split.

        Raises:
            PredictionError: There is none of that name, or nothing in it.
        """
        filled = [other for other, count in self.shards.samples.items() if count]
        if name not in filled:
            what = f"{self.shards.where} has no split {name}, only {', '.join(filled)}"
            if name == "test" and (lost := self.shards.test_entries):
                what += (
                    f": the build left out all {len(lost):,} entries of testdata.json, such as "
                    f"{lost[0].file} ({lost[0].reason}); `shardprep predict` with --fill SPEAKER "
                    "writes a stand-in for each"
                )
            elif filled:
                what += f"; --split {filled[-1]} names one"
            raise PredictionError(what)
        return self.shards[name]

    @property
    def lacks_test(self) -> bool:
        """Whether the build left out every entry of testdata.json."""
        entries = self.shards.test_entries
        return bool(entries) and all(entry.index is None for entry in entries)

    @cached_property
    def training(self) -> Collected:
        """The train split, embedded.

        Raises:
            PredictionError: As `split` and `embed`.
        """
        return self.embed(self.split("train"))

    @cached_property
    def _enrolled(self) -> Wccn:
        enough = self.shards.samples.get("train", 0) > 0
        if not (enough and (self.shards["train"].labels >= 0).any()):
            raise PredictionError(
                f"{self.shards.where} has no train split with speakers, by whose utterances "
                "--backend wccn would know them; take shards that have one, or --backend head"
            )
        return Wccn(self.training.embeddings, self.shards["train"].labels)

    @cached_property
    def speakers(self) -> tuple[str, ...]:
        """Names of the speakers that can be recognised, by their numbers."""
        if self.backend == "head":
            return self.classes
        return tuple(self.shards.speakers[number] for number in self._enrolled.speakers)

    def batches(self, part: Split) -> UtteranceLoader:
        """The whole utterances of a split, batched by length; all of them, in every process."""
        return UtteranceLoader(
            part, max_frames=self.max_frames, pad_value=self.pad_value, rank=0, world_size=1
        )

    def embed(self, part: Split, classes: Labels | None = None) -> Collected:
        """Embed every utterance of a split, and classify it by the head of the model.

        Args:
            part: The split.
            classes: The model's number of each utterance's speaker (N,), -1 where it has none;
                None counts nothing. Not the split's labels: those number the shards' speakers.

        Raises:
            PredictionError: An embedding is not finite.
        """
        labels = np.full(len(part), -1) if classes is None else classes
        found = collect(self.views, self.batches(part), labels, device=self.device)
        bad = np.flatnonzero(~np.isfinite(found.embeddings).all(axis=1))
        if len(bad):
            raise PredictionError(
                f"{self.file}: the embeddings of {len(bad)} utterances of {part.name} are not "
                f"finite, the first is {part.keys[bad[0]]}; the run has diverged or the features "
                "are faulty: take another checkpoint, or see `shardprep verify`"
            )
        return found

    def recognise(self, part: Split, speakers: Labels | None = None) -> Collected:
        """Embed every utterance of a split and name its speaker by the backend.

        Args:
            part: The split.
            speakers: Number of each utterance's speaker (N,) in `Inference.speakers`, -1 where it
                is not among them; None counts nothing.

        Raises:
            PredictionError: As `embed` and `training`, or the train split has no speakers.
        """
        if self.backend == "head":
            return self.embed(part, speakers)
        enrolled = self._enrolled
        found = self.training if part.name == "train" else self.embed(part)
        numbers = np.full(len(part), -1) if speakers is None else speakers
        return Collected(found.embeddings, grade(enrolled.scores, found.embeddings, numbers))


def open_inference(
    options: ModelOptions, tell: Callable[[str], None], may_be_empty: bool = False
) -> Inference:
    """Load the model, open the shards, and tell what a user should know of them.

    Args:
        options: What to open.
        tell: Shows a line of text to the user.
        may_be_empty: Whether the shards may lack the split test, where all its entries were left
            out by the build.

    Raises:
        CheckpointError: The checkpoint is missing or damaged, or its parts do not fit together.
        PredictionError: The shards have another number of mel bins, or nothing in the split.
        ShardprepError: The shards cannot be read.
    """
    checkpoint = load(find_checkpoint(options.run, options.checkpoint))
    config = checkpoint.config
    try:
        shards = open_shards_of(config.data, options.shards)
    except ShardprepError:
        if not options.shards:
            tell("note: these are the shards that the model was trained on; --shards names others")
        raise
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tell(f"{checkpoint.file}, after {checkpoint.step:,} steps, on {device.type}")
    n_mels, expected = shards.n_mels, checkpoint.n_mels
    if n_mels != expected:
        raise PredictionError(
            f"{shards.where} has {n_mels} mel bins a frame, but the model was trained on "
            f"{expected}; build shards from features like those it was trained on"
        )
    left_out = read_left_out(shards)
    if left_out is not None:
        tell(f"note: {left_out.note}")
    frames = options.tta_frames or config.data.segment_frames
    inference = Inference(
        file=checkpoint.file,
        step=checkpoint.step,
        classes=checkpoint.speakers,
        backend=options.backend or config.predict.backend,
        views=Views(
            load_model(checkpoint).to(device), options.tta, frames, checkpoint.longest_frames
        ).eval(),
        shards=shards,
        left_out=left_out,
        device=device,
        max_frames=options.max_frames,
        pad_value=config.data.pad_value,
        thresholds=checkpoint.thresholds,
        calibration=checkpoint.calibration,
    )
    if not (may_be_empty and inference.lacks_test):
        part, longest = inference.split(options.split), checkpoint.longest_frames
        if cut := int((part.frames > longest).sum()):
            tell(
                f"note: {cut:,} utterances of {part.name} are longer than {longest:,} frames; each "
                "is embedded in pieces, whose mean counts"
            )
    if inference.backend != "head":
        who = f"those of the train split of {shards.where}, which is embedded first"
        tell(f"note: speakers are named by --backend {inference.backend}: {who}")
        if options.split == "train":
            tell(
                "note: the accuracy on train says nothing: speakers are known by these very "
                "utterances"
            )
    return inference
