"""Recordings."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import soundfile

from kinds.registry import kind, register

RATE = 16_000


def encoded(samples: np.ndarray, form: str, subtype: str | None = None) -> bytearray:
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, subtype, format=form)
    return bytearray(file.getvalue())


def noise(seconds: float) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, int(seconds * RATE))


def m4a() -> bytearray:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=RATE, layout="mono")
        planes = noise(2)[None].astype(np.float32)
        frame = av.AudioFrame.from_ndarray(planes, format="fltp", layout="mono")
        frame.sample_rate = RATE
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    return bytearray(file.getvalue())


def forged(name: str, sentence: str, make: Callable[[], bytes | bytearray]) -> None:
    """A kind that is one recording of these bytes."""
    register(name, sentence, lambda folder: target(folder).write_bytes(make()) and None, "audio")


def target(folder: Path) -> Path:
    return folder / "id0" / "a.wav"


def patched(data: bytearray, at: int, value: int, size: int, order: str = "little") -> bytearray:
    data[at : at + size] = value.to_bytes(size, "big" if order == "big" else "little")
    return data


def flac_of(samples: int) -> bytearray:
    data = encoded(noise(1), "FLAC")
    # 36 bits; the 4 bits before them belong to another field.
    data[21] = (data[21] & 0xF0) | (samples >> 32)
    return patched(data, 22, samples & 0xFFFF_FFFF, 4, "big")


def m4a_of_many_samples() -> bytearray:
    data = m4a()
    return patched(data, data.index(b"stsz") + 4 + 8, 0x0FFF_FFFF, 4, "big")


forged("recording-empty", "a recording has 0 bytes", bytes)
forged(
    "recording-of-one-sample", "a recording has one sample", lambda: encoded(noise(1)[:1], "WAV")
)
forged(
    "recording-of-nan",
    "a sample of a recording is not a number",
    lambda: encoded(np.where(np.arange(RATE) == 9, np.nan, noise(1)), "WAV", "FLOAT"),
)
forged(
    "recording-of-infinity",
    "a sample of a recording is infinite",
    lambda: encoded(np.where(np.arange(RATE) == 9, np.inf, noise(1)), "WAV", "DOUBLE"),
)
forged(
    "recording-wav-of-4-gb",
    "the header of a short wav claims 4 GB",
    lambda: patched(encoded(noise(1), "WAV"), 40, 0xF000_0000, 4),
)
forged(
    "recording-flac-of-10-9-samples",
    "the header of a short flac claims 10^9 samples",
    lambda: flac_of(10**9),
)
forged(
    "recording-of-65535-channels",
    "the header of a wav claims 65,535 channels",
    lambda: patched(encoded(noise(1), "WAV"), 22, 65_535, 2),
)
forged(
    "recording-of-4-ghz",
    "the header of a wav claims four billion samples a second",
    lambda: patched(encoded(noise(1), "WAV"), 24, 0xFFFF_FFF0, 4),
)
forged("recording-mp3-cut", "an mp3 ends in the middle", lambda: encoded(noise(4), "MP3")[:9000])
forged("recording-m4a-cut", "an m4a ends before its table of contents", lambda: m4a()[:9000])
forged("recording-m4a-of-many-parts", "an m4a claims 268 million parts", m4a_of_many_samples)
forged(
    "recording-names-a-file",
    "a recording is a list for FFmpeg that names ../outside/secret",
    lambda: b"ffconcat version 1.0\n#\0\nfile ../outside/secret\n",
)
forged(
    "recording-names-a-url",
    "a recording is a playlist that names a URL",
    lambda: b"#EXTM3U\n#\0\n#EXTINF:9,\nhttp://127.0.0.1:9/canary\n#EXT-X-ENDLIST\n",
)


@kind("audio")
def recording_pipe(folder: Path) -> None:
    """a recording is a named pipe"""
    os.mkfifo(target(folder))


@kind("audio")
def recording_device(folder: Path) -> None:
    """a recording leads to a device that never ends"""
    target(folder).symlink_to("/dev/zero")
