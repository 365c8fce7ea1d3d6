"""Writes recordings as a data set in the homework's layout: a `.pt` file an utterance."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from shardprep.audio.recipe import FeatureRecipe
from shardprep.build.options import BuildOptions
from shardprep.build.plan import ShardTask, shard_tasks
from shardprep.build.pools.local import LocalPool
from shardprep.build.pools.pool import ProgressListener, run_shards
from shardprep.build.shard import Advance, ShardRecord, reject_of
from shardprep.errors import BuildError, SourceError, needs
from shardprep.format.index import IndexRow
from shardprep.format.manifest import MANIFEST_NAME, Reject, ShardInfo
from shardprep.source.contents import Source
from shardprep.source.dataset import rejects_error, source_error
from shardprep.source.metadata import MAPPING, METADATA, TESTDATA
from shardprep.source.recordings.reader import RecordingReader
from shardprep.source.scan import scan_source
from shardprep.storage.local import publish
from shardprep.storage.remote import Remote, locate
from shardprep.storage.trouble import storage_errors


@dataclass
class FeaturesReport:
    """What was written.

    Attributes:
        destination: The folder.
        utterances: Utterances, those of testing included.
        speakers: Speakers.
        frames: Frames of all utterances.
        rejects: Recordings that were left out.
        seconds: Time taken.
    """

    destination: str
    utterances: int = 0
    speakers: int = 0
    frames: int = 0
    rejects: list[Reject] = field(default_factory=list)
    seconds: float = 0.0


def write_features(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    recipe: FeatureRecipe | None = None,
    *,
    workers: int = 0,
    on_error: str = "fail",
    follow_links: bool = False,
    listener: ProgressListener | None = None,
) -> FeaturesReport:
    """Write the log-mels of recordings as a data set in the homework's layout.

    Each becomes KEY.pt, a float32 tensor (T, F). metadata.json comes last, with the recipe: a
    folder without it is unfinished, and the same call completes it.

    Args:
        source: Recordings, as for `build_shards`.
        destination: The folder; made if need be.
        recipe: From recordings to log-mels; None for the homework's.
        workers: Processes; 0 for as many as there are cores.
        on_error: "fail": a faulty recording stops; "skip": it is left out.
        follow_links: Whether files may be links out of the folder.
        listener: Receives the progress.

    Raises:
        SourceError: There are no recordings, or one is faulty.
        BuildError: The folder holds a data set or a shard set already, is that of the
            recordings, or is a URL.
        MissingExtraError: PyTorch is not installed.
        StorageError: The disk failed.
    """
    with needs("torch"):
        import torch  # noqa: F401
    began = time.monotonic()
    target = _folder(destination)
    scanned = scan_source(source, follow_links=follow_links, recipe=recipe or FeatureRecipe())
    if not isinstance(scanned.reader, RecordingReader):
        raise SourceError("has features, and no recordings", file=scanned.root)
    if scanned.rejects and on_error == "fail":
        raise rejects_error(scanned.rejects, scanned.root)
    with storage_errors(target):
        target.mkdir(parents=True, exist_ok=True)
        if isinstance(scanned.root, Path) and scanned.root.resolve() == target.resolve():
            raise BuildError(
                "is the folder of the recordings", file=target, remedy="Name another folder."
            )
        for name in (METADATA, MANIFEST_NAME):
            if (target / name).exists():
                raise BuildError(
                    f"has a {name} already", file=target, remedy="Name another folder."
                )
    options = BuildOptions(
        dtype="float32", val_fraction=0, on_error="skip" if on_error == "skip" else "fail"
    )
    tasks = shard_tasks(scanned, options)
    records = run_shards(
        tasks,
        partial(_write_files, target),
        LocalPool(workers),
        listener or ProgressListener(),
    )
    rows = {row.key: row.frames for record in records for row in record.rows}
    report = FeaturesReport(str(target), len(rows), frames=sum(rows.values()))
    report.rejects = [*scanned.rejects, *(r for record in records for r in record.rejects)]
    report.speakers = _write_metadata(target, scanned, rows)
    report.seconds = time.monotonic() - began
    return report


def _folder(destination: str | os.PathLike[str]) -> Path:
    found = locate(destination)
    if isinstance(found, Remote):
        raise BuildError(
            "is a URL, and features are written to a folder of this machine",
            file=str(found),
            remedy="Name a folder, or pack the recordings with `shardprep build`.",
        )
    return found


def _write_files(target: Path, task: ShardTask, advance: Advance) -> ShardRecord:
    """Write the files of a task's utterances, in place of a shard."""
    import torch

    rows, rejects, nbytes = [], [], 0
    for utterance, mel in task.reader.read(task.plan.utterances, task.n_mels):
        if isinstance(mel, ValueError):
            reject = reject_of(utterance, mel)
            if not task.skip:
                raise source_error(reject, task.reader.root)
            rejects.append(reject)
        else:
            path = target / f"{utterance.key}.pt"
            with storage_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            with publish(path) as file:
                torch.save(torch.from_numpy(mel), file)
            rows.append(IndexRow(0, 0, len(mel), utterance.label, 0, utterance.key))
        nbytes += utterance.nbytes
        advance(utterance.nbytes)
    info = ShardInfo(task.plan.file, len(rows), sum(row.frames for row in rows), 0, "")
    return ShardRecord(task.inputs, info, tuple(rows), tuple(rejects), nbytes)


def _write_metadata(target: Path, source: Source, frames: dict[str, int]) -> int:
    """Write the JSON files; the number of speakers."""
    labelled: dict[str, list[dict[str, Any]]] = {}
    for own in (source.labelled, *source.fixed.values()):
        for utterance in own:
            if utterance.key in frames:
                labelled.setdefault(str(utterance.speaker), []).append(
                    _entry(utterance.key, frames)
                )
    about = {"n_mels": source.n_mels}
    names = sorted(labelled)
    mapping = {
        "speaker2id": {name: number for number, name in enumerate(names)},
        "id2speaker": {str(number): name for number, name in enumerate(names)},
    }
    files: dict[str, Any] = {MAPPING: mapping}
    if test := [_entry(u.key, frames) for u in source.test if u.key in frames]:
        files[TESTDATA] = {**about, "utterances": test}
    speakers = {name: labelled[name] for name in names}
    files[METADATA] = {**about, "features": source.features, "speakers": speakers}
    for name, content in files.items():
        with publish(target / name) as file:
            file.write(json.dumps(content, indent=1).encode() + b"\n")
    return len(names)


def _entry(key: str, frames: dict[str, int]) -> dict[str, Any]:
    return {"feature_path": f"{key}.pt", "mel_len": frames[key]}
