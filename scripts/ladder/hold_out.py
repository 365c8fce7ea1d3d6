"""Hold out recording situations of the training data, to compare recipes on.

    python -m scripts.ladder.hold_out Dataset/ held-out/ [--situations 4]
    python -m scripts.ladder --data held-out/ --rung boss --rung best --seed 0

A random validation split has the same rooms, channels and noises as the training data. So it says
little about new ones, and does not show what augmentation is good for. This program makes a new
data set, in the same layout, whose test split has situations of its own:

- It describes each utterance by the mean and the 10th percentile of every mel bin (the channel, and
  the background noise between the words), and groups the utterances of each speaker by Ward's
  method.
- Of the groups with at most half of the speaker's utterances, the group farthest from the others
  becomes part of the test split.
- The other utterances are training data, without those that share a recording with the test split.
  Two utterances share a recording if their mels correlate, because they contain the same words of
  the same take, perhaps in another room.
- If less than a third of a speaker's utterances would remain for training, none is held out.

The test split of the given data set is left out. Files are linked, or copied where links are not
possible.

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
from tqdm import tqdm

from shardprep import ShardprepError
from shardprep.source.dataset import Source, Utterance, scan_dataset, source_error
from shardprep.source.features import Expected, load_features
from shardprep_trainer.evaluation.labels import HEADER

# We compare pieces of one second. Only one in five hundred pairs of utterances from two speakers
# correlates above 0.55. Utterances with words of the same take correlate at 0.55 to 0.95; the more
# noise, the less.
PIECE_FRAMES = 100
SHARED = 0.55


def describe(mel: NDArray[np.float32]) -> NDArray[np.float64]:
    """How an utterance was recorded: its mean and its 10th percentile, mel (T, F) to (2 * F,)."""
    return np.concatenate([mel.mean(0, dtype=np.float64), np.percentile(mel, 10, axis=0)])


def choose_group(sounds: NDArray[np.float64], situations: int) -> NDArray[np.bool_]:
    """The utterances of a speaker to hold out.

    Args:
        sounds: (N, 2 * F), see `describe`.
        situations: Number of groups to make.

    Returns:
        (N,), True for the utterances of the group that is farthest from the others. The distance is
        that of the closest two utterances, one inside the group and one outside. All False if every
        group is too large.
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
    """How similar two utterances, (T, F) and (T', F), are in their most similar pieces.

    Returns:
        The highest correlation of a piece of the shorter utterance with a piece of the longer one.
        Pieces have `PIECE_FRAMES` frames, less their mean frame. In the shorter utterance a piece
        starts at every quarter of its length, in the longer one at every frame.
    """
    short, long = sorted((one, other), key=len)
    frames = min(PIECE_FRAMES, len(short))
    places = len(long) - frames + 1
    sums = np.lib.stride_tricks.sliding_window_view(long, frames, axis=0).sum(2, dtype=np.float64)
    squares = np.convolve((long.astype(np.float64) ** 2).sum(1), np.ones(frames), "valid")
    energy = (squares - (sums * sums).sum(1) / frames).clip(1e-6)  # about the mean frame: (places,)
    size = next_fast_len(len(long))
    spectrum = rfft(long, size, axis=0)
    best = -1.0
    for start in range(0, len(short) - frames + 1, max(1, frames // 4)):
        piece = short[start : start + frames]
        piece = piece - piece.mean(0, dtype=np.float64)
        product = irfft((rfft(piece, size, axis=0).conj() * spectrum).sum(1), size)[:places]
        power = (piece * piece).sum().clip(1e-6)
        best = max(best, float((product / np.sqrt(energy * power)).max()))
    return best


@dataclass(frozen=True)
class Parts:
    """The utterances of a speaker, divided."""

    kept: list[Utterance]
    held: list[Utterance]
    left_out: list[Utterance]
    """Not held out, but from the same recording as an utterance that is."""


def divide_speaker(source: Source, utterances: Sequence[Utterance], situations: int) -> Parts:
    """Divide the utterances of a speaker.

    Raises:
        SourceError: An utterance is not what metadata.json says; the message names its file.
    """
    mels = [
        load_features(source.root / one.path, Expected(source.n_mels, one.frames))
        for one in utterances
    ]
    chosen = choose_group(np.array([describe(mel) for mel in mels]), situations)
    parts = Parts([], [], [])
    held_mels = [mel for mel, hold in zip(mels, chosen, strict=True) if hold]
    for utterance, mel, hold in zip(utterances, mels, chosen, strict=True):
        if hold:
            parts.held.append(utterance)
        elif any(correlation(other, mel) > SHARED for other in held_mels):
            parts.left_out.append(utterance)
        else:
            parts.kept.append(utterance)
    return parts if 3 * len(parts.kept) >= len(utterances) else Parts(list(utterances), [], [])


def divide(dataset: Path, situations: int) -> tuple[Source, dict[str, Parts]]:
    """Check a data set, and divide the utterances of each speaker.

    Raises:
        SourceError: A file of the data set is wrong; the message names it.
    """
    source = scan_dataset(dataset)
    for reject in source.rejects:
        if reject.split != "test":
            raise source_error(reject, source.root, "Repair the data set.")
    by_speaker: dict[str, list[Utterance]] = {name: [] for name in source.speakers}
    for one in source.labelled:
        by_speaker[str(one.speaker)].append(one)
    # Show a progress bar only in a terminal.
    shown = tqdm(by_speaker.items(), unit="speaker", disable=None)
    return source, {speaker: divide_speaker(source, own, situations) for speaker, own in shown}


def listed(utterances: Sequence[Utterance]) -> list[dict[str, object]]:
    """Utterances as metadata.json and testdata.json list them."""
    return [{"feature_path": one.path, "mel_len": one.frames} for one in utterances]


def link_file(source: Path, target: Path) -> None:
    """Link a file to another path, or copy it; makes the folders of that path."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        # Resolve first: a relative symbolic link would point nowhere from its new folder.
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


@click.command(context_settings={"show_default": True})
@click.argument("dataset", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--situations", type=click.IntRange(2), default=4, help="Groups for each speaker.")
def main(dataset: Path, target: Path, situations: int) -> None:
    """Divide the training data of DATASET into a data set with a new test split, in TARGET."""
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
            link_file(dataset / utterance.path, new / utterance.path)
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
        f"{left:,} left out because they share a recording with these"
    )


if __name__ == "__main__":
    main()
