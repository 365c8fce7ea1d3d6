"""Features from recordings: speed beside torchaudio and librosa, and what the kind of file changes.

    python -m scripts.bench.audio AUDIO/ [--recordings 100] [--out scripts/results/audio.json]

The recordings are decoded once, brought to 16 kHz, and written as wav files of 16 bits. Everything
runs on one core, in turns. The results are medians over the rounds, by processor time: other
programs disturb it little.

- Transform: the samples of each file to log-mels, by `log_mel` and by the transforms of torchaudio
  and librosa with the same parameters, if these are installed; and how far they are from `log_mel`.
- Whole: the file to log-mels by the whole recipe, `audio_features`.
- Differences: each recording is resampled in float64, written in each kind of file, and made into
  features; these are compared with the features of the samples it came from. Silence stays, so that
  frames correspond; bins above 45 % of the lower rate are left out.
"""

from __future__ import annotations

import importlib
import io
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import click
import msgspec
import numpy as np
import soundfile
from scipy.signal import resample_poly

from shardprep import FeatureRecipe, audio_features, log_mel, read_audio
from shardprep.audio.mel import filterbank
from shardprep.bench.machine import machine

RATE = 16_000
HOMEWORK = FeatureRecipe()
WITH_SILENCE = FeatureRecipe(silence_level=None)
RATES = (8_000, 11_025, 16_000, 22_050, 32_000, 44_100, 48_000)
Transform = Callable[[Any], Any]


def encoded(samples: Any, rate: int, kind: str, subtype: str | None) -> bytes:
    """Samples (N, C) as a file, by soundfile; by FFmpeg if it is m4a."""
    out = io.BytesIO()
    channels = samples.shape[1]
    if kind != "m4a":
        with soundfile.SoundFile(out, "w", rate, channels, subtype, format=kind) as file:
            # libsndfile crashes on long pieces of Vorbis.
            for at in range(0, len(samples), 4096):
                file.write(samples[at : at + 4096])
        return out.getvalue()
    with av.open(out, "w", format="mp4") as container:
        layout = "mono" if channels == 1 else "stereo"
        stream = container.add_stream("aac", rate=rate, layout=layout, bit_rate=128_000)
        planes = np.ascontiguousarray(samples.T, np.float32)
        frame = av.AudioFrame.from_ndarray(planes, format="fltp", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    return out.getvalue()


KINDS: dict[str, tuple[str, str | None]] = {
    "wav, 16 bits": ("WAV", "PCM_16"),
    "wav, float": ("WAV", "FLOAT"),
    "flac": ("FLAC", "PCM_16"),
    "ogg (Vorbis)": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", None),
    "m4a (AAC, 128 kbit/s)": ("m4a", None),
}


def kinds() -> Iterator[tuple[str, int, int]]:
    """Every kind of file, rate and number of channels that can be."""
    for name, rate, channels in itertools.product(KINDS, RATES, (1, 2)):
        if name != "opus" or rate in (8_000, 16_000, 48_000):
            yield name, rate, channels


def transforms() -> dict[str, tuple[Transform, Callable[[Any], Any]]]:
    """Ways to log-mels from samples, and how each wants its samples."""
    ways: dict[str, tuple[Transform, Callable[[Any], Any]]] = {
        "shardprep": (lambda samples: log_mel(samples, HOMEWORK), lambda samples: samples)
    }
    shape = {"n_fft": 400, "win_length": 400, "hop_length": 160, "power": 2.0, "n_mels": 40}
    try:
        torch, torchaudio = importlib.import_module("torch"), importlib.import_module("torchaudio")
        torch.set_num_threads(1)
        mel = torchaudio.transforms.MelSpectrogram(RATE, f_min=50.0, f_max=8000.0, **shape)
        ways["torchaudio"] = (lambda x: mel(x).clamp_(min=1e-9).log_(), torch.from_numpy)
    except ImportError:
        click.echo("torchaudio is not installed", err=True)
    try:
        librosa = importlib.import_module("librosa")
        options = {"sr": RATE, "fmin": 50, "fmax": 8000, "htk": True, "norm": None}
        options |= {"pad_mode": "reflect"} | shape
        ways["librosa"] = (
            lambda x: np.log(
                np.maximum(librosa.feature.melspectrogram(y=x, **options), np.float32(1e-9))
            ),
            lambda samples: samples,
        )
    except ImportError:
        click.echo("librosa is not installed", err=True)
    return ways


def deviations(samples: list[Any]) -> dict[str, float]:
    """The largest difference of each way's log-mels from those of `log_mel`."""
    found = {}
    for name, (transform, prepare) in transforms().items():
        every = (np.asarray(transform(prepare(own))) for own in samples)
        expected = (log_mel(own, HOMEWORK) for own in samples)
        found[name] = max(
            float(np.abs((mel if name == "shardprep" else mel.T) - own).max())
            for mel, own in zip(every, expected, strict=True)
        )
    return found


def speeds(wavs: list[bytes], rounds: int) -> dict[str, float]:
    """Seconds of recording that each way takes in a second."""
    samples = [read_audio(data, sample_rate=RATE) for data in wavs]
    seconds = sum(map(len, samples)) / RATE
    works: dict[str, Callable[[], None]] = {}
    for name, (transform, prepare) in transforms().items():
        works[f"transform, {name}"] = _all(transform, [prepare(own) for own in samples])
    works["whole, shardprep"] = _all(lambda data: audio_features(data, HOMEWORK), wavs)
    rates: dict[str, list[float]] = {name: [] for name in works}
    for number, (name, work) in itertools.product(range(rounds + 1), works.items()):
        began = time.process_time()
        work()
        # The first round loads libraries and makes tables.
        if number:
            rates[name].append(seconds / (time.process_time() - began))
    return {name: statistics.median(found) for name, found in rates.items()}


def _all(work: Transform, inputs: list[Any]) -> Callable[[], None]:
    def run() -> None:
        for one in inputs:
            work(one)

    return run


def difference(samples: Any, name: str, rate: int, channels: int) -> Any:
    """Magnitudes of the differences of log-mels, of the bins that both have."""
    share = Fraction(rate, RATE)
    other = resample_poly(samples.astype(np.float64), share.numerator, share.denominator)
    # Filters may overshoot: leave them room, the recipe sets the level again.
    other = np.repeat(other[:, None] * 0.5, channels, axis=1)
    data = encoded(other, rate, *KINDS[name])
    expected, found = audio_features(samples, WITH_SILENCE), audio_features(data, WITH_SILENCE)
    centres = filterbank(WITH_SILENCE).argmax(axis=1) * RATE / WITH_SILENCE.n_fft
    bins = centres < 0.45 * min(rate, RATE)
    count = min(len(expected), len(found))
    return np.abs(expected[:count, bins] - found[:count, bins])


@click.command()
@click.argument("audio", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--recordings", default=100, show_default=True, help="Files to measure.")
@click.option("--compared", default=5, show_default=True, help="Files to compare in every kind.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Result file to write (JSON).")
def main(audio: Path, recordings: int, compared: int, rounds: int, out: Path | None) -> None:
    """Measure speed and differences, and print tables."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    paths = sorted(p for p in audio.rglob("*") if p.suffix in (".wav", ".flac"))[:recordings]
    decoded = [read_audio(path, sample_rate=RATE) for path in paths]
    rates = speeds([encoded(own[:, None], RATE, "WAV", None) for own in decoded], rounds)
    far = deviations(decoded)
    own = rates["transform, shardprep"]
    click.echo("| what | times real time | relative to log_mel |\n|---|---|---|")
    for name, value in rates.items():
        click.echo(f"| {name} | {value:,.0f} | {value / own:.2f} |")
    for name, value in far.items():
        click.echo(f"largest difference from log_mel, {name}: {value:.5f}")
    click.echo("\n| kind | rate | channels | median | 99 % below |\n|---|---|---|---|---|")
    rows = []
    for name, rate, channels in kinds():
        every = [difference(x, name, rate, channels).ravel() for x in decoded[:compared]]
        middle, high = np.quantile(np.concatenate(every), [0.5, 0.99])
        rows.append(
            {"kind": name, "rate": rate, "channels": channels}
            | {"median": round(float(middle), 5), "p99": round(float(high), 5)}
        )
        click.echo(f"| {name} | {rate} | {channels} | {middle:.4f} | {high:.3f} |")
    if out is not None:
        result = {
            "machine": msgspec.to_builtins(machine()),
            "recordings": len(decoded),
            "seconds": round(sum(map(len, decoded)) / RATE, 1),
            "times_real_time": {name: round(value) for name, value in rates.items()},
            "largest_difference_of_transforms": {n: round(value, 5) for n, value in far.items()},
            "differences": rows,
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
