"""A data set of synthetic voices: its plan, its log-mels and its files.

Axes: T frames of 10 ms, N samples.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from wave import open as open_wav

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from scripts.synthetic import voice

N_MELS = 40
N_FFT = 400
F_MIN, F_MAX = 50.0, 8000.0
FLOOR = 1e-9
PEAK = 10.0 ** (-3.0 / 20.0)
TRAIN_SESSIONS = 10
TEST_SESSIONS = 3
# Speakers, sessions, utterances and the plan have independent random numbers, seeded by these.
_SPEAKER, _SESSION, _UTTERANCE, _PLAN = range(4)

README = """\
Synthetic data: this is not speech.

Every file here was computed by scripts/synthetic from random numbers (seed {seed}).
{speakers} invented voices (pitch, vocal tract, breath, habits) babble random syllables, through
invented microphones, rooms and noise. There are no words in it, and no person was recorded.

It has the layout and the kind of numbers of a real data set: Dataset/ holds {train} labelled and
{test} test utterances as log-mels (T, 40), 10 ms a frame; test_labels.csv holds the true
speakers of the test utterances, which come from recording sessions that are not in training.

Use it to try and to time tools. Accuracy on it says nothing about real speech.
"""


README_RECORDINGS = """\
Synthetic data: this is not speech.

Every file here was computed by scripts/synthetic from random numbers (seed {seed}).
{speakers} invented voices (pitch, vocal tract, breath, habits) babble random syllables, through
invented microphones, rooms and noise. There are no words in it, and no person was recorded.

recordings/SPEAKER/SESSION/NUMBER.wav, 16 kHz: {train} recordings of ten sessions a speaker, and
{test} of three further sessions (session10 to session12), for testing.

Use it to try and to time tools. Accuracy on it says nothing about real speech.
"""


@dataclass(frozen=True)
class Utterance:
    """A file to write: its speaker, its recording session and its frames."""

    number: int
    speaker: int
    session: int
    frames: int
    name: str


@dataclass(frozen=True)
class Plan:
    """All utterances of the set, before they are computed."""

    seed: int
    speakers: int
    train: tuple[Utterance, ...]
    test: tuple[Utterance, ...]


def plan_dataset(speakers: int, lengths: Iterable[int], test: int, seed: int) -> Plan:
    """Choose speaker and session of each utterance; a pure function of its arguments.

    Args:
        speakers: Number of speakers; their numbers of utterances differ by at most one.
        lengths: Frames of each utterance; the last `test` of them are test utterances.
        test: Number of test utterances, at most as many as there are lengths.
        seed: Seed of the set, also of the file names.

    Returns:
        The plan. Sessions below `TRAIN_SESSIONS` are for training only, those above for test only.
    """
    frames = list(lengths)
    train = len(frames) - test
    rng = np.random.default_rng([seed, _PLAN, 0])
    speaker = np.arange(len(frames)) % speakers
    speaker[train:] = rng.permutation(np.arange(test) % speakers)
    session = rng.integers(0, TRAIN_SESSIONS, len(frames))
    session[train:] = TRAIN_SESSIONS + rng.integers(0, TEST_SESSIONS, test)
    utterances = tuple(
        Utterance(i, int(speaker[i]), int(session[i]), frames[i], _file_name(seed, i))
        for i in range(len(frames))
    )
    return Plan(seed, speakers, utterances[:train], utterances[train:])


def draw_lengths(count: int, shortest: int, longest: int, seed: int) -> list[int]:
    """Draw lengths in frames within [shortest, longest], log-normal as in real sets."""
    rng = np.random.default_rng([seed, _PLAN, 1])
    middle = (math.log(shortest) + math.log(longest)) / 2.0
    spread = (math.log(longest) - math.log(shortest)) / 4.0
    drawn = np.exp(rng.normal(middle, spread, count))
    return [int(n) for n in np.rint(drawn).clip(shortest, longest)]


@lru_cache(maxsize=1)
def mel_filterbank() -> Tensor:
    """Triangles of height 1 on the HTK mel scale, 2595 log10(1 + f / 700): float32 (201, 40)."""
    top, bottom = (2595.0 * math.log10(1.0 + f / 700.0) for f in (F_MAX, F_MIN))
    mels = torch.linspace(bottom, top, N_MELS + 2, dtype=torch.float64)
    edges = 700.0 * (10.0 ** (mels / 2595.0) - 1.0)
    freqs = torch.linspace(0.0, voice.SAMPLE_RATE / 2, N_FFT // 2 + 1, dtype=torch.float64)
    rising = (freqs[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - freqs[:, None]) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0.0).float()


def log_mel(wave: Tensor) -> Tensor:
    """Log-mels like those of the homework.

    Args:
        wave: float32 (N,) at 16 kHz, N > 200, at any level; it is scaled to a peak of -3 dB.

    Returns:
        float32 (N // 160 + 1, 40): natural log of the mel power, at least log(1e-9).
    """
    wave = wave * (PEAK / wave.abs().max())
    window = torch.hann_window(N_FFT)
    spectrum = torch.stft(wave, N_FFT, voice.HOP, N_FFT, window, center=True, return_complex=True)
    power = spectrum.real.square() + spectrum.imag.square()  # (201, T)
    return (power.T @ mel_filterbank()).clamp(min=FLOOR).log()


def render(utterance: Utterance, seed: int) -> Tensor:
    """Compute the log-mels of an utterance, float32 (frames, 40); a pure function."""
    mel = log_mel(_speak(utterance, seed))
    assert mel.shape == (utterance.frames, N_MELS)
    return mel


def _speak(utterance: Utterance, seed: int) -> Tensor:
    """The waveform of an utterance, float32 (N,) at 16 kHz, at any level; a pure function."""
    speaker = _draw_speaker(seed, utterance.speaker)
    session = _draw_session(seed, utterance.speaker, utterance.session)
    rng = np.random.default_rng([seed, _UTTERANCE, utterance.number])
    return voice.speak(speaker, session, utterance.frames, rng)


def write_recordings(out: Path, plan: Plan, workers: int) -> None:
    """Write OUT/recordings/SPEAKER/SESSION/NUMBER.wav, 16 kHz and 16 bit, for every utterance.

    Each folder of a session has utterances of that session alone; those of testing come last.
    """
    everything = plan.train + plan.test
    with _mapper(workers) as mapper:
        done = mapper(partial(_record, out / "recordings", plan.seed), everything)
        for _ in tqdm(done, total=len(everything), unit="recording", mininterval=0.5):
            pass
    counts = {"train": len(plan.train), "test": len(plan.test)}
    readme = README_RECORDINGS.format(seed=plan.seed, speakers=plan.speakers, **counts)
    (out / "README.txt").write_text(readme)


def _record(folder: Path, seed: int, utterance: Utterance) -> None:
    wave = _speak(utterance, seed)
    samples = (wave * (PEAK / wave.abs().max()) * 32767).round().to(torch.int16).numpy()
    place = folder / f"id{utterance.speaker:05d}" / f"session{utterance.session:02d}"
    place.mkdir(parents=True, exist_ok=True)
    with open_wav(str(place / f"{utterance.number:05d}.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(voice.SAMPLE_RATE)
        file.writeframes(samples.astype("<i2").tobytes())


def write_dataset(out: Path, plan: Plan, workers: int) -> None:
    """Write every utterance of the plan, then the other files of the data set.

    metadata.json is written last, by rename: a folder without this file is from an interrupted run.
    """
    folder = out / "Dataset"
    folder.mkdir(parents=True)
    everything = plan.train + plan.test
    with _mapper(workers) as mapper:
        done = mapper(partial(_make, folder, plan.seed), everything)
        for _ in tqdm(done, total=len(everything), unit="utterance", mininterval=0.5):
            pass
    names = [f"id{n:05d}" for n in range(plan.speakers)]
    table = io.StringIO(newline="")
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["Id", "Category"])
    rows.writerows((u.name, names[u.speaker]) for u in plan.test)
    (out / "test_labels.csv").write_text(table.getvalue())
    counts = {"train": len(plan.train), "test": len(plan.test)}
    readme = README.format(seed=plan.seed, speakers=plan.speakers, **counts)
    (out / "README.txt").write_text(readme)
    _write_json(folder / "testdata.json", {"n_mels": N_MELS, "utterances": _entries(plan.test)})
    mapping = {
        "speaker2id": {name: n for n, name in enumerate(names)},
        "id2speaker": {str(n): name for n, name in enumerate(names)},
    }
    _write_json(folder / "mapping.json", mapping)
    spoken: dict[str, list[Utterance]] = {name: [] for name in names}
    for utterance in plan.train:
        spoken[names[utterance.speaker]].append(utterance)
    speakers = {name: _entries(utterances) for name, utterances in spoken.items()}
    _write_json(folder / "metadata.json", {"n_mels": N_MELS, "speakers": speakers})


@lru_cache(maxsize=1024)
def _draw_speaker(seed: int, speaker: int) -> voice.Speaker:
    return voice.draw_speaker(np.random.default_rng([seed, _SPEAKER, speaker]))


@lru_cache(maxsize=8192)
def _draw_session(seed: int, speaker: int, session: int) -> voice.Session:
    return voice.draw_session(np.random.default_rng([seed, _SESSION, speaker, session]))


def _file_name(seed: int, number: int) -> str:
    return f"uttr-{hashlib.md5(f'{seed}/{number}'.encode(), usedforsecurity=False).hexdigest()}.pt"


def _entries(utterances: Iterable[Utterance]) -> list[dict[str, object]]:
    return [{"feature_path": u.name, "mel_len": u.frames} for u in utterances]


def _write_json(path: Path, value: object) -> None:
    partial_path = path.with_suffix(".partial")
    partial_path.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(partial_path, path)


def _make(folder: Path, seed: int, utterance: Utterance) -> None:
    torch.save(render(utterance, seed), folder / utterance.name)


@contextmanager
def _mapper(workers: int) -> Iterator[partial[Iterator[None]]]:
    """A `map` in processes or in this one; each has one torch thread, so that sums are equal."""
    if workers > 1:
        # Not fork: the child of a process in which torch has started threads may hang.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
            yield partial(pool.map, chunksize=16)
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield partial(map)
    finally:
        torch.set_num_threads(threads)
