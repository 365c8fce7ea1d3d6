"""Write the embedding of every utterance: `shardprep embed RUN --split val --out FILE.npz`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np

from shardprep import publish
from shardprep_trainer.commands import EXIT_CODES, model_options, note, reported_errors, tell
from shardprep_trainer.inference import Inference, ModelOptions, open_inference


def write_embeddings(inference: Inference, split: str, path: Path) -> tuple[int, int]:
    """Embed a split and write it as an npz file that `np.load` reads without pickle.

    The file appears whole or not at all. It holds, in the split's own order:

        embeddings   (N, D) float32, as the model gives them: not of length 1
        keys         (N,) strings
        labels       (N,) int64, positions in speakers, -1 where unknown
        speakers     (S,) strings, the speakers of the shards
        checkpoint, split, fingerprint   strings; step, tta, tta_frames   int64; all scalars

    Args:
        inference: The model and the shards.
        split: Name of the split.
        path: The file.

    Returns:
        Number of utterances N and width D.

    Raises:
        PredictionError: There is no such split, or an embedding is not finite.
        StorageError: The disk refused.
    """
    part, views = inference.split(split), inference.views
    embeddings = inference.embed(part).embeddings
    arrays: dict[str, Any] = {
        "embeddings": embeddings,
        "keys": np.asarray(part.keys, np.str_),
        "labels": part.labels.astype(np.int64),
        "speakers": np.array(inference.shards.speakers, np.str_),
        "checkpoint": np.array(str(inference.file)),
        "step": np.array(inference.step, np.int64),
        "split": np.array(split),
        "fingerprint": np.array(inference.shards.fingerprint),
        "tta": np.array(views.segments, np.int64),
        "tta_frames": np.array(views.frames if views.segments else 0, np.int64),
    }
    with publish(path) as file:
        np.savez(file, **arrays)
    return len(part), embeddings.shape[1]


@click.command(
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
    help=f"""Write the embedding of every whole utterance of a split with the model of RUN.

    RUN is a run folder, a model folder or a checkpoint. The file holds embeddings (N, D) float32,
    keys, labels, speakers and where they come from; numpy.load reads it with allow_pickle=False.
    {EXIT_CODES}""",
)
@model_options(split="val")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default="embeddings.npz",
    help="File to write.",
)
def main(out: Path, **options: Any) -> None:
    """The command; its help is above."""
    with reported_errors():
        inference = open_inference(ModelOptions(**options), tell)
        count, width = write_embeddings(inference, options["split"], out)
    note(f"{count:,} embeddings of width {width} -> {out}")


if __name__ == "__main__":
    main()
