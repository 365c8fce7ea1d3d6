"""Write embeddings: of recordings, or of every utterance of a split.

shardprep embed MODEL a.wav DIR/ list.csv --out x.npz
shardprep embed MODEL --split val --out x.parquet
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from click.core import ParameterSource
from numpy.typing import NDArray

from shardprep import MissingExtraError, publish, recordings_in
from shardprep_trainer.checkpoint.find import holds_model
from shardprep_trainer.commands import EXIT_CODES, model_options, note, reported_errors, tell
from shardprep_trainer.errors import ConfigError
from shardprep_trainer.evaluation.verification import join
from shardprep_trainer.inference import ModelOptions, find_files, open_inference
from shardprep_trainer.pretrained.model import SpeakerModel
from shardprep_trainer.pretrained.on_shards import Inference
from shardprep_trainer.pretrained.options import (
    audio_argument,
    features_option,
    on_error_option,
    open_model,
    use_all,
)
from shardprep_trainer.pretrained.progress import progress
from shardprep_trainer.pretrained.recordings import Recording, check_there, find_recordings

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

        Of M models, the embeddings are joined: those of each model at length 1, side by side, the
        whole at length 1, so that a cosine is the mean of the models' cosines. Then checkpoint,
        step and tta_frames are (M,), and widths (M,) int64 says how wide each model's part is.

    Raises:
        PredictionError: There is no such split, or an embedding is not finite.
    """
    part, models = inference.split(split), inference.models
    found = inference.embed(part)
    return {
        "embeddings": found.embeddings,
        "keys": np.asarray(part.keys, np.str_),
        "labels": part.labels.astype(np.int64),
        "speakers": np.array(inference.shards.speakers, np.str_),
        **_made_by([(model.file, model.step) for model in models], found.each),
        "split": np.array(split),
        "fingerprint": np.array(inference.shards.fingerprint),
        "tta": np.array(inference.tta, np.int64),
        "tta_frames": _one_or_each(np.array(inference.tta_frames, np.int64)),
    }


def embed_recordings(
    models: Sequence[SpeakerModel], recordings: Sequence[Recording], on_error: str
) -> dict[str, Any]:
    """Embed recordings.

    Returns:
        What the file holds, in the order of the recordings:

        embeddings   (N, D) float32, as the model gives them: not of length 1
        keys, paths  (N,) strings
        frames       (N,) int64, after silence was removed
        checkpoint   string; step   int64; both scalars

        Of several models as `embed_split` says.

    Raises:
        PredictionError: A recording cannot be used.
    """
    using = use_all(models, recordings, on_error)
    shown = progress(using, len(recordings), "recordings", lambda _: 1, "recording")
    found = list(shown)
    embeddings = zip(*([own.embedding for own in used] for _, used in found), strict=True)
    each = [np.stack(own) for own in embeddings]
    files = [(model.checkpoint.file, model.checkpoint.step) for model in models]
    return {
        "embeddings": join(each),
        "keys": np.array([recording.key for recording, _ in found], np.str_),
        "paths": np.array([str(recording) for recording, _ in found], np.str_),
        "frames": np.array([used[0].frames for _, used in found], np.int64),
        **_made_by(files, each),
    }


def _made_by(
    files: Sequence[tuple[Path, int]], each: Sequence[NDArray[np.float32]]
) -> dict[str, Any]:
    """The checkpoints, and of several how wide the embeddings (N, D) are that were joined."""
    found = {
        "checkpoint": _one_or_each(np.array([str(file) for file, _ in files])),
        "step": _one_or_each(np.array([step for _, step in files], np.int64)),
    }
    widths = {"widths": np.array([own.shape[1] for own in each], np.int64)}
    return found if len(files) == 1 else {**found, **widths}


def _one_or_each(values: NDArray[Any]) -> NDArray[Any]:
    """Of one model its value () alone, else those of all (M,)."""
    return values.reshape(()) if len(values) == 1 else values


def _open_models(
    places: Sequence[str], checkpoint: str, features_from: str | None, encoders: Sequence[str]
) -> list[SpeakerModel]:
    """The models for recordings, in the order of their files; tells which they are."""
    if len(places) > 1:
        places = [str(file) for file in find_files([Path(place) for place in places], checkpoint)]
    models = [open_model(place, checkpoint, features_from, encoders) for place in places]
    for model in models:
        of = model.checkpoint
        tell(f"{of.file}, after {of.step:,} steps, on {model.device.type}")
    return models


def _parted(places: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The models and the recordings among places, told apart by what they hold.

    Raises:
        ConfigError: A folder holds both.
    """
    models = [place for place in places if holds_model(place)]
    for model in models:
        if model.is_dir() and recordings_in(model):
            raise ConfigError(
                f"{model}: holds a model and recordings, such as {recordings_in(model)[0]}; name "
                "the file of the model, or the recordings"
            )
    return models, [place for place in places if place not in models]


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
    rows = ("embeddings", "keys", "labels", "speakers", "paths", "frames")
    about = {name: str(value.tolist()) for name, value in arrays.items() if name not in rows}
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
    split of the shards is embedded. More models of this machine may stand among AUDIO: then the
    embeddings of all are joined, so that a cosine is the mean of theirs. The file holds embeddings
    (N, D) float32, keys, and where they come from; numpy.load reads the npz with
    allow_pickle=False. {EXIT_CODES}""",
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
    audio: Sequence[Path],
    on_error: str,
    features_from: str | None,
    out: Path,
    **options: Any,
) -> None:
    """The command; its help is above."""
    with reported_errors():
        others, audio = _parted(audio)
    models = [options.pop("model"), *others]

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
            recordings = find_recordings(audio)
            check_there(recordings)
            places = [str(place) for place in models]
            encoders, choice = options["encoders"], options["checkpoint"]
            opened = _open_models(places, choice, features_from, encoders)
            arrays = embed_recordings(opened, recordings, on_error)
        else:
            inference = open_inference(ModelOptions(models, **options), tell)
            arrays = embed_split(inference, options["split"])
        write_table(out, arrays)
    count, width = arrays["embeddings"].shape
    note(f"{count:,} embeddings of width {width} -> {out}")


if __name__ == "__main__":
    main()
