"""Write the embedding of every utterance: `shardprep embed RUN --split val --out FILE.npz`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np

from shardprep import publish
from shardprep_trainer.inference import (
    EXIT_CODES,
    ModelOptions,
    model_options,
    note,
    open_session,
    reported_errors,
)
from shardprep_trainer.session import Session


def write_embeddings(session: Session, split: str, path: Path) -> tuple[int, int]:
    """Embed a split and write it as an npz file that `np.load` reads without pickle.

    The file appears whole or not at all. It holds, in the split's own order:

        embeddings   (N, D) float32, as the model gives them: not of length 1
        keys         (N,) strings
        labels       (N,) int64, positions in speakers, -1 where unknown
        speakers     (S,) strings, the speakers of the shards
        checkpoint, split, fingerprint   strings; step, tta, tta_frames   int64; all scalars

    Args:
        session: The model and the shards.
        split: Name of the split.
        path: The file.

    Returns:
        Number of utterances N and width D.

    Raises:
        PredictionError: There is no such split, or an embedding is not finite.
        StorageError: The disk refused.
    """
    part, views = session.split(split), session.views
    embeddings = session.hear(part).embeddings
    arrays: dict[str, Any] = {
        "embeddings": embeddings,
        "keys": np.asarray(part.keys, np.str_),
        "labels": part.labels.astype(np.int64),
        "speakers": np.array(session.shards.speakers, np.str_),
        "checkpoint": np.array(str(session.file)),
        "step": np.array(session.step, np.int64),
        "split": np.array(split),
        "fingerprint": np.array(session.shards.manifest.fingerprint),
        "tta": np.array(views.segments, np.int64),
        "tta_frames": np.array(views.frames if views.segments else 0, np.int64),
    }
    with publish(path) as file:
        np.savez(file, **arrays)
    return len(part), embeddings.shape[1]


@click.command(
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
    help=f"""Write the embedding of every utterance of a split, heard whole, with the model of RUN.

    The file holds embeddings (N, D) float32, keys, labels, speakers and where they come from;
    numpy.load reads it with allow_pickle=False. {EXIT_CODES}""",
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
        session = open_session(ModelOptions(**options))
        count, width = write_embeddings(session, options["split"], out)
    note(f"{count:,} embeddings of width {width} -> {out}")


if __name__ == "__main__":
    main()
