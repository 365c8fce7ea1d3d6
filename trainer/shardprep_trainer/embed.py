"""Write embeddings: of recordings, or of every utterance of a split.

shardprep embed MODEL a.wav DIR/ list.csv --out x.npz
shardprep embed MODEL --split val --out x.parquet
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
from click.core import ParameterSource
from tqdm import tqdm

from shardprep import MissingExtraError, publish
from shardprep_trainer.commands import EXIT_CODES, model_options, note, reported_errors, tell
from shardprep_trainer.inference import Inference, ModelOptions, open_inference
from shardprep_trainer.pretrained.options import (
    audio_argument,
    features_option,
    on_error_option,
    open_model,
    use_all,
)
from shardprep_trainer.pretrained.recordings import find_recordings

_OF_SHARDS = ("shards", "split", "max_frames", "tta", "tta_frames")


def embed_split(inference: Inference, split: str) -> dict[str, Any]:
    """Embed a split.

    Returns:
        What the file holds, in the split's own order:

        embeddings   (N, D) float32, as the model gives them: not of length 1
        keys         (N,) strings
        labels       (N,) int64, positions in speakers, -1 where unknown
        speakers     (S,) strings, the speakers of the shards
        checkpoint, split, fingerprint   strings; step, tta, tta_frames   int64; all scalars

    Raises:
        PredictionError: There is no such split, or an embedding is not finite.
    """
    part, views = inference.split(split), inference.views
    return {
        "embeddings": inference.embed(part).embeddings,
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


def embed_recordings(
    place: str, checkpoint: str, features_from: str | None, audio: tuple[Path, ...], on_error: str
) -> dict[str, Any]:
    """Embed recordings.

    Returns:
        What the file holds, in the order of the recordings:

        embeddings   (N, D) float32, as the model gives them: not of length 1
        keys, paths  (N,) strings
        frames       (N,) int64, after silence was removed
        checkpoint   string; step   int64; both scalars

    Raises:
        PredictionError: A recording cannot be used.
    """
    recordings = find_recordings(audio)
    model = open_model(place, checkpoint, features_from)
    of = model.checkpoint
    tell(f"{of.file}, after {of.step:,} steps, on {model.device.type}")
    using = use_all(model, recordings, on_error)
    found = list(tqdm(using, total=len(recordings), unit="recording", disable=None, leave=False))
    return {
        "embeddings": np.stack([used.embedding for _, used in found]),
        "keys": np.array([recording.key for recording, _ in found], np.str_),
        "paths": np.array([str(recording) for recording, _ in found], np.str_),
        "frames": np.array([used.frames for _, used in found], np.int64),
        "checkpoint": np.array(str(of.file)),
        "step": np.array(of.step, np.int64),
    }


def write_table(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays as an npz file, or as Parquet if the name says so.

    The file appears whole or not at all. numpy.load reads the npz without pickle. Parquet has one
    row an utterance: embedding, key, and speaker, path and frames where they are known; what
    concerns all rows is in the metadata of the schema.

    Raises:
        MissingExtraError: pyarrow is not installed.
        StorageError: The disk refused.
    """
    data = io.BytesIO()
    if path.suffix.lower() == ".parquet":
        _write_parquet(data, arrays)
    else:
        np.savez(data, **arrays)
    with publish(path) as file:
        file.write(data.getbuffer())


def _write_parquet(file: io.BytesIO, arrays: Mapping[str, Any]) -> None:
    pa, pq = _pyarrow()
    embeddings = arrays["embeddings"]
    columns: dict[str, Any] = {"key": pa.array(arrays["keys"].tolist())}
    if "labels" in arrays:
        names = [*arrays["speakers"].tolist(), ""]
        columns["speaker"] = pa.array([names[label] for label in arrays["labels"]])
    for name, column in (("paths", "path"), ("frames", "frames")):
        if name in arrays:
            columns[column] = pa.array(arrays[name].tolist())
    flat = pa.array(embeddings.reshape(-1))
    columns["embedding"] = pa.FixedSizeListArray.from_arrays(flat, embeddings.shape[1])
    about = {name: str(value) for name, value in arrays.items() if value.ndim == 0}
    pq.write_table(pa.table(columns).replace_schema_metadata(about), file)


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "the package pyarrow is not installed", remedy="Run: pip install 'shardprep[parquet]'"
        ) from error
    return pa, pq


@click.command(
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
    help=f"""Write the embeddings of recordings, or of every whole utterance of a split.

    MODEL is a run folder, a model folder or a checkpoint; for recordings also OWNER/NAME on the
    Hugging Face Hub. Each AUDIO is a recording, a folder of recordings, or a list (.csv, .tsv,
    .jsonl) with the column path and perhaps key, start and end in seconds. Without AUDIO, the
    split of the shards is embedded. The file holds embeddings (N, D) float32, keys, and where
    they come from; numpy.load reads the npz with allow_pickle=False. {EXIT_CODES}""",
)
@model_options(split="val", name="model")
@audio_argument(required=False)
@on_error_option
@features_option
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default="embeddings.npz",
    help="File to write, .npz or .parquet.",
)
@click.pass_context
def main(
    context: click.Context,
    /,
    audio: tuple[Path, ...],
    on_error: str,
    features_from: str | None,
    out: Path,
    **options: Any,
) -> None:
    """The command; its help is above."""

    def given(name: str) -> bool:
        return context.get_parameter_source(name) is not ParameterSource.DEFAULT

    if audio and (names := [name for name in _OF_SHARDS if given(name)]):
        option = f"--{names[0].replace('_', '-')}"
        raise click.UsageError(f"{option} is for shards: it does not go with recordings")
    for name in () if audio else ("on_error", "features_from"):
        if given(name):
            raise click.UsageError(f"--{name.replace('_', '-')} is for recordings: name some")
    with reported_errors():
        if out.suffix.lower() == ".parquet":
            # What is missing is said before the long work.
            _pyarrow()
        if audio:
            arrays = embed_recordings(
                str(options["run"]), options["checkpoint"], features_from, audio, on_error
            )
        else:
            inference = open_inference(ModelOptions(**options), tell)
            arrays = embed_split(inference, options["split"])
        write_table(out, arrays)
    count, width = arrays["embeddings"].shape
    note(f"{count:,} embeddings of width {width} -> {out}")


if __name__ == "__main__":
    main()
