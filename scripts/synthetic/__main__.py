"""Write a synthetic data set in the homework's layout, to try all commands without real data.

    python -m scripts.synthetic OUT/ [--speakers 20] [--utterances 40] [--test-utterances 100]
    python -m scripts.synthetic OUT/ --recordings

The program writes OUT/Dataset/{metadata,mapping,testdata}.json, one `uttr-<32 hex>.pt` for each
utterance, float32 (T, 40) log-mels, and OUT/test_labels.csv with the true speakers of the test
utterances. `voice.py` computes the voices: speech-like babble without words, and no recording of
anybody. Use it to try the tools and to measure their speed; accuracy on it says nothing about real
speech.

With --recordings it writes the waveforms instead, as OUT/recordings/SPEAKER/SESSION/NUMBER.wav.

Test utterances come from recording sessions that are not in the training data, so test accuracy is
lower than validation accuracy on a random split.

The same arguments give the same bytes on the same machine, whatever the number of workers. Exit
codes: 0 written, 2 wrong usage (a non-empty OUT, a broken lengths file).
"""

from __future__ import annotations

import os
from pathlib import Path

import click

from scripts.synthetic import voice
from scripts.synthetic.dataset import (
    draw_lengths,
    plan_dataset,
    write_dataset,
    write_recordings,
)


def read_lengths(path: Path) -> list[int]:
    """Read the frames of each utterance, one number on each line.

    Raises:
        click.UsageError: A line is not a number of frames, or too small a number.
    """
    lengths = []
    for number, line in enumerate(path.read_text().split("\n"), start=1):
        if not line.strip():
            continue
        if not line.strip().isdecimal() or int(line) < voice.MIN_FRAMES:
            raise click.UsageError(
                f"{path}, line {number}: {line.strip()[:40]!r} is no length in frames; "
                f"write one whole number on each line, {voice.MIN_FRAMES} or more."
            )
        lengths.append(int(line))
    return lengths


def _choose_lengths(
    utterances: int, test: int, shortest: int, longest: int, seed: int, lengths: Path | None
) -> list[int]:
    """The frames of every utterance, from a file or drawn between the bounds."""
    if lengths is not None:
        return read_lengths(lengths)
    if shortest > longest:
        raise click.UsageError(f"--frames-min {shortest} exceeds --frames-max {longest}: lower it.")
    return draw_lengths(utterances + test, shortest, longest, seed)


_FRAMES = click.IntRange(min=voice.MIN_FRAMES)
_COUNT = click.IntRange(min=1)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command(context_settings={"show_default": True})
@click.argument("out", type=_FOLDER)
@click.option("--speakers", type=click.IntRange(2, 99_999), default=20)
@click.option("--utterances", type=_COUNT, default=40, help="Labelled utterances of each speaker.")
@click.option(
    "--test-utterances",
    type=click.IntRange(min=0),
    help="Test utterances in all.  [default: 100, or 0 with --lengths]",
)
@click.option(
    "--frames-min", type=_FRAMES, default=150, help="Shortest utterance; a frame is 10 ms."
)
@click.option("--frames-max", type=_FRAMES, default=600, help="Longest utterance, in frames.")
@click.option(
    "--lengths",
    type=_FILE,
    help="File of lengths in frames, one on each line: make an utterance of each length instead. "
    "The last --test-utterances of them are test utterances.",
)
@click.option("--recordings", is_flag=True, help="Write waveforms (wav) in place of log-mels.")
@click.option("--seed", type=click.IntRange(min=0), default=0)
@click.option("--workers", type=_COUNT, default=os.cpu_count() or 1, show_default=False)
def main(
    out: Path,
    speakers: int,
    utterances: int,
    test_utterances: int | None,
    frames_min: int,
    frames_max: int,
    lengths: Path | None,
    recordings: bool,
    seed: int,
    workers: int,
) -> None:
    """Write a synthetic, speech-like data set in the homework's layout into OUT, a new folder."""
    if out.exists() and any(out.iterdir()):
        raise click.UsageError(f"{out} is not empty: name a new folder, or delete this one first.")
    test = (0 if lengths else 100) if test_utterances is None else test_utterances
    frames = _choose_lengths(speakers * utterances, test, frames_min, frames_max, seed, lengths)
    train = len(frames) - test
    if train < speakers:
        raise click.UsageError(
            f"{lengths} holds {len(frames)} lengths, {test} of them for testing, which leaves too "
            f"few for {speakers} speakers: lower --speakers or --test-utterances."
        )
    write = write_recordings if recordings else write_dataset
    write(out, plan_dataset(speakers, frames, test, seed), workers)
    click.echo(
        f"{out}: {train} labelled and {test} test utterances of {speakers} synthetic speakers, "
        f"{sum(frames) / 360_000:.2f} hours"
    )


if __name__ == "__main__":
    main()
