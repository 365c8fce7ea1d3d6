"""The file that a user means by a run folder, a model folder or a path."""

from __future__ import annotations

from pathlib import Path

from shardprep_trainer.checkpoint.files import CheckpointFolder
from shardprep_trainer.checkpoint.model_folder import WEIGHTS
from shardprep_trainer.errors import CheckpointError

_MOST_RUNS = 10


def find_checkpoint(place: Path, choice: str = "best") -> Path:
    """The file to load.

    Args:
        place: A run folder, a model folder, or a file of either.
        choice: Which of a run folder: "best", "last", or a path that is taken in place of `place`.

    Raises:
        CheckpointError: There is no such checkpoint.
    """
    if choice not in ("best", "last"):
        return find_checkpoint(Path(choice))
    # A file that is missing is for its reader to report. A run may have a name like v1.pt.
    named = place.suffix in (".pt", Path(WEIGHTS).suffix)
    if place.is_file() or (named and not place.is_dir()):
        return place
    if choice == "best" and (place / WEIGHTS).exists():
        return place / WEIGHTS
    folder = CheckpointFolder(place)
    newest = folder.latest()
    if choice == "best" and folder.best.exists():
        return folder.best
    if choice == "last" and newest is not None:
        return newest
    remedy = "train first: shardprep train"
    runs = [str(file.parents[1]) for file in sorted(place.glob(f"*/model/{WEIGHTS}"))]
    if (place / "manifest.json").exists():
        remedy = f"it is a shard set: name the run first, and the shards with --shards {place}"
    elif (place / "metadata.json").exists():
        remedy = "it is a data set: name the folder of a run, such as runs/NAME"
    elif not place.exists():
        remedy = f"the folder does not exist; name that of a run, or {remedy}"
    elif (place / WEIGHTS).exists() or folder.best.exists():
        remedy = "only the best model is there: leave out --checkpoint"
        if CheckpointFolder(place.parent).latest() is not None:
            remedy += f", or name the run folder {place.parent}"
    elif runs:
        remedy = f"name one of the runs in it: {', '.join(runs[:_MOST_RUNS])}"
    elif (folder.folder / "best.pt").exists():
        remedy = "best.pt is of version 0.1.0, which this version does not read: train again"
    elif choice == "best" and newest is not None:
        # Not --checkpoint last, which train.start_from does not have.
        remedy = f"it has not been validated yet: name {newest} in its place"
    raise CheckpointError(f"{place}: there is no {choice} checkpoint; {remedy}")


def holds_model(place: Path) -> bool:
    """Whether a place is a run folder, a model folder, or a file of either, by what it holds."""
    if not place.is_dir():
        return place.suffix in (".pt", Path(WEIGHTS).suffix)
    folder = CheckpointFolder(place)
    return (place / WEIGHTS).exists() or folder.best.exists() or folder.latest() is not None
