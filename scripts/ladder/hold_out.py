"""Hold out recording situations of the training data, to choose a recipe by.

    python -m scripts.ladder.hold_out Dataset/ held-out/ [--situations 4]
    python -m scripts.ladder --data held-out/ --rung boss --rung best --seed 0

A random validation split shares its rooms, channels and noises with what is trained on, so it says
little about others, and nothing about what augmentation is for. Here the utterances of each speaker
are grouped by the mean and the 10th percentile of every mel bin (the channel, and what is heard
between the words), by Ward's method, and of the groups that hold no more than half of them the one
farthest from the others becomes the test split of a new data set, in the same layout. The rest is
its training data, less what shares a recording with the held-out utterances: where the same words
of the same take are heard, even in another room, their mels correlate. Of a speaker of whom less
than a third would be left to train on, nothing is held out. The test split of the old one is left
out. Files are linked, or copied where that is not possible.

The groups are guesses: some utterances of a held-out situation stay in training, so the new split
is easier than situations that training never saw. The data set is checked as `shardprep build`
checks it. Exit codes: 0 done, 2 usage, else those of shardprep.

Axis legend: N utterances of a speaker, T frames, F mel bins.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.fft import irfft, next_fast_len, rfft
from scipy.spatial.distance import cdist
from shardprep_trainer.evaluation.labels import HEADER
from tqdm import tqdm

from shardprep import ShardprepError
from shardprep.source.dataset import Source, Utterance, scan_dataset, source_error
from shardprep.source.features import load_features

# One second. Of utterances of two speakers one pair in five hundred correlates above 0.55 over so
# many frames; those that share words of one take do so at 0.55 to 0.95, the less the noisier.
WINDOW = 100
SHARED = 0.55


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


def correlation(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """How alike two utterances, (T, F) and (T', F), are where they are most alike.

    Returns:
        The highest correlation of `WINDOW` frames of the shorter one, taken at every quarter of a
        window, with as many of the longer one at any place, mean frames subtracted.
    """
    short, long = sorted((one, other), key=len)
    window = min(WINDOW, len(short))
    places = len(long) - window + 1
    sums = np.lib.stride_tricks.sliding_window_view(long, window, axis=0).sum(2, dtype=np.float64)
    squares = np.convolve((long.astype(np.float64) ** 2).sum(1), np.ones(window), "valid")
    energy = (squares - (sums * sums).sum(1) / window).clip(1e-6)  # about the mean frame: (places,)
    size = next_fast_len(len(long))
    spectrum = rfft(long, size, axis=0)
    best = -1.0
    for start in range(0, len(short) - window + 1, max(1, window // 4)):
        part = short[start : start + window]
        part = part - part.mean(0, dtype=np.float64)
        product = irfft((rfft(part, size, axis=0).conj() * spectrum).sum(1), size)[:places]
        best = max(best, float((product / np.sqrt(energy * (part * part).sum().clip(1e-6))).max()))
    return best


@dataclass(frozen=True)
class Parts:
    """The utterances of a speaker."""

    kept: list[Utterance]
    held: list[Utterance]
    left_out: list[Utterance]
    """Not held out, but with a recording of those that are."""


def part(source: Source, utterances: Sequence[Utterance], situations: int) -> Parts:
    """Divide the utterances of a speaker.

    Raises:
        SourceError: One is not what the metadata say; names its file.
    """
    mels = [
        load_features(source.root / one.path, n_mels=source.n_mels, frames=one.frames)
        for one in utterances
    ]
    away = choose_group(np.array([describe(mel) for mel in mels]), situations)
    parts = Parts([], [], [])
    held_mels = [mel for mel, out in zip(mels, away, strict=True) if out]
    for utterance, mel, out in zip(utterances, mels, away, strict=True):
        if out:
            parts.held.append(utterance)
        elif any(correlation(other, mel) > SHARED for other in held_mels):
            parts.left_out.append(utterance)
        else:
            parts.kept.append(utterance)
    return parts if 3 * len(parts.kept) >= len(utterances) else Parts(list(utterances), [], [])


def divide(dataset: Path, situations: int) -> tuple[Source, dict[str, Parts]]:
    """Look through a data set, and divide the utterances of each speaker.

    Raises:
        SourceError: Something in it is not as it should be; names the file.
    """
    source = scan_dataset(dataset)
    for reject in source.rejects:
        if reject.split != "test":
            raise source_error(reject, source.root, "Mend the data set.")
    by_speaker: dict[str, list[Utterance]] = {name: [] for name in source.speakers}
    for one in source.labelled:
        by_speaker[str(one.speaker)].append(one)
    # The bar is for a terminal alone.
    shown = tqdm(by_speaker.items(), unit="speaker", disable=None)
    return source, {speaker: part(source, own, situations) for speaker, own in shown}


def listed(utterances: Sequence[Utterance]) -> list[dict[str, object]]:
    """Utterances as the files of a data set list them."""
    return [{"feature_path": one.path, "mel_len": one.frames} for one in utterances]


def place(source: Path, target: Path) -> None:
    """Have the file in another place as well, whose folders are made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)  # of a link itself the copy might lead nowhere
    except OSError:
        shutil.copyfile(source, target)


@click.command(context_settings={"show_default": True})
@click.argument("dataset", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--situations", type=click.IntRange(2), default=4, help="Groups a speaker.")
def main(dataset: Path, target: Path, situations: int) -> None:
    """Make of the training data of DATASET a data set with a test split of its own, in TARGET."""
    for name in ("metadata.json", "mapping.json"):
        if not (dataset / name).exists():
            raise click.UsageError(f"{dataset}: there is no {name}; name the Dataset/ folder")
    new = target / "Dataset"
    if new.exists():
        raise click.UsageError(f"{new} is there already; name another folder, or remove it")
    try:
        source, speakers = divide(dataset, situations)
    except ShardprepError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    new.mkdir(parents=True)
    for parts in speakers.values():
        for utterance in parts.kept + parts.held:
            place(dataset / utterance.path, new / utterance.path)
    shutil.copyfile(dataset / "mapping.json", new / "mapping.json")
    held = [utterance for parts in speakers.values() for utterance in parts.held]
    test = {"n_mels": source.n_mels, "utterances": listed(held)}
    (new / "testdata.json").write_text(json.dumps(test))
    with (target / "test_labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([HEADER, *((one.path, one.speaker) for one in held)])
    kept = {speaker: listed(parts.kept) for speaker, parts in speakers.items()}
    (new / "metadata.json").write_text(json.dumps({"n_mels": source.n_mels, "speakers": kept}))
    left = sum(len(parts.left_out) for parts in speakers.values())
    click.echo(
        f"{new}: {sum(map(len, kept.values())):,} utterances to train on, {len(held):,} held out, "
        f"{left:,} left out for sharing a recording with those"
    )


if __name__ == "__main__":
    main()
