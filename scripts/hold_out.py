"""Hold out recording situations of the training data, to choose a recipe by.

    python scripts/hold_out.py Dataset/ held-out/ [--situations 4]
    python scripts/ladder.py --data held-out/ --rungs boss best --seeds 0

A random validation split shares its rooms, channels and noises with what is trained on, so it says
little about others, and nothing about what augmentation is for. Here the utterances of each speaker
are grouped by the mean and the 10th percentile of every mel bin (the channel, and what is heard
between the words), by Ward's method, and of the groups that hold no more than half of them the one
farthest from the others becomes the test split of a new data set, in the same layout. The rest is
its training data; the test split of the old one is left out. Files are linked, or copied where that
is not possible.

The groups are guesses: some utterances of a held-out situation stay in training, so the new split
is easier than situations that were never heard. Exit codes: 0 done, 2 usage.

Axis legend: N utterances of a speaker, T frames, F mel bins.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import cdist
from tqdm import tqdm

from trainer.labels import HEADER

Entry = dict[str, Any]


def describe(mel: NDArray[np.float32]) -> NDArray[np.float64]:
    """How an utterance was recorded: its mean and its 10th percentile, mel (T, F) to (2 * F,)."""
    return np.concatenate([mel.mean(0, dtype=np.float64), np.percentile(mel, 10, axis=0)])


def choose_group(sounds: NDArray[np.float64], situations: int) -> NDArray[np.bool_]:
    """The utterances of a speaker to hold out.

    Args:
        sounds: (N, 2 * F), see `describe`.
        situations: Groups to make of them.

    Returns:
        (N,), True on those of the group that is farthest from all others, by the least distance
        between an utterance of the one and of the other; nowhere if every group is too large.
    """
    none = np.zeros(len(sounds), bool)
    if len(sounds) < 2:
        return none
    groups = fcluster(linkage(sounds, "ward"), situations, "maxclust")
    chosen, farthest = none, 0.0
    for group in np.unique(groups):
        inside = groups == group
        if 2 * inside.sum() > len(sounds):
            continue
        distance = float(cdist(sounds[inside], sounds[~inside]).min())
        if distance > farthest:
            chosen, farthest = inside, distance
    return chosen


def split(
    dataset: Path, situations: int
) -> tuple[dict[str, list[Entry]], list[tuple[Entry, str]], int]:
    """What stays of every speaker, what is held out and whose it is, and the number of mel bins."""
    metadata = json.loads((dataset / "metadata.json").read_text())
    kept: dict[str, list[Entry]] = {}
    held: list[tuple[Entry, str]] = []
    for speaker, entries in tqdm(metadata["speakers"].items(), unit="speaker"):
        sounds = [
            describe(torch.load(dataset / entry["feature_path"], weights_only=True).numpy())
            for entry in entries
        ]
        out = choose_group(np.array(sounds), situations)
        kept[speaker] = [entry for entry, away in zip(entries, out, strict=True) if not away]
        held += [(entry, speaker) for entry, away in zip(entries, out, strict=True) if away]
    return kept, held, metadata["n_mels"]


def place(source: Path, target: Path) -> None:
    """Have the file in another place as well."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@click.command(context_settings={"show_default": True})
@click.argument("dataset", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--situations", type=click.IntRange(2), default=4, help="Groups a speaker.")
def main(dataset: Path, target: Path, situations: int) -> None:
    """Make of the training data of DATASET a data set with a test split of its own, in TARGET."""
    if not (dataset / "metadata.json").exists():
        raise click.UsageError(f"{dataset}: there is no metadata.json; name the Dataset/ folder")
    new = target / "Dataset"
    if new.exists():
        raise click.UsageError(f"{new} is there already; name another folder, or remove it")
    kept, held, n_mels = split(dataset, situations)
    new.mkdir(parents=True)
    for entry in [*(one for each in kept.values() for one in each), *(one for one, _ in held)]:
        place(dataset / entry["feature_path"], new / entry["feature_path"])
    shutil.copyfile(dataset / "mapping.json", new / "mapping.json")
    test = {"n_mels": n_mels, "utterances": [entry for entry, _ in held]}
    (new / "testdata.json").write_text(json.dumps(test))
    with (target / "test_labels.csv").open("w", newline="") as file:
        rows = [(entry["feature_path"], speaker) for entry, speaker in held]
        csv.writer(file).writerows([HEADER, *rows])
    (new / "metadata.json").write_text(json.dumps({"n_mels": n_mels, "speakers": kept}))
    left = sum(map(len, kept.values()))
    click.echo(f"{new}: {left:,} utterances to train on, {len(held):,} held out")


if __name__ == "__main__":
    main()
