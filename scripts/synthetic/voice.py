"""Synthetic voices: seeded source-filter speech at 16 kHz, as recorded through a poor channel.

A `Speaker` is a larynx and a vocal tract. A `Session` is the microphone, the room and the mood of
one recording. `speak` draws random syllables, moves the formants smoothly from phone to phone,
filters pulses and noise with them in the short-time Fourier domain, and returns a waveform. The
result is babble: it has no words, and is nobody's voice.

Axes: T frames of 10 ms, K = 241 frequencies of the synthesis transform, N samples.

Sources: vowel formants from Peterson and Barney (1952), men; the cascade of resonances from Klatt
(1980), "Software for a cascade/parallel formant synthesizer"; the reverberation is Polack's
exponentially decaying noise. We chose the other numbers by
looking at spectrograms and at statistics of mels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SAMPLE_RATE = 16_000
HOP = 160
MIN_FRAMES = 8
_FFT = 3 * HOP  # with three Hann windows in each hop, their squares add up to a constant
_SLOW, _FAST = 11, 3  # frames in which formants and gains change from phone to phone

_WINDOW = torch.hann_window(_FFT)
_FREQUENCIES = torch.linspace(0.0, SAMPLE_RATE / 2, _FFT // 2 + 1)  # (K,), Hz
# We delay high frequencies of a glottal pulse, by up to 4 ms. Without delays, all harmonics would
# peak at the same time, and the level after peak normalisation would be too low.
_DISPERSION = torch.polar(
    torch.ones_like(_FREQUENCIES), -math.pi * 0.004 / (SAMPLE_RATE / 2) * _FREQUENCIES.square()
)

Floats = NDArray[np.float64]

# F1 to F4 (Hz); gains of voice, breath and friction; centre (Hz) and width (octaves) of friction;
# mean length (frames). A stop has two rows: closure and burst.
_PHONES: dict[str, tuple[float, ...]] = {
    "i": (270, 2290, 3010, 3600, 1.0, 0.0, 0.0, 3000, 1.0, 9),
    "I": (390, 1990, 2550, 3500, 1.0, 0.0, 0.0, 3000, 1.0, 7),
    "E": (530, 1840, 2480, 3500, 1.0, 0.0, 0.0, 3000, 1.0, 9),
    "ae": (660, 1720, 2410, 3500, 1.0, 0.0, 0.0, 3000, 1.0, 12),
    "V": (640, 1190, 2390, 3500, 1.0, 0.0, 0.0, 3000, 1.0, 8),
    "A": (730, 1090, 2440, 3500, 1.0, 0.0, 0.0, 3000, 1.0, 12),
    "O": (570, 840, 2410, 3400, 1.0, 0.0, 0.0, 3000, 1.0, 11),
    "U": (440, 1020, 2240, 3300, 1.0, 0.0, 0.0, 3000, 1.0, 7),
    "u": (300, 870, 2240, 3300, 1.0, 0.0, 0.0, 3000, 1.0, 9),
    "er": (490, 1350, 1690, 3300, 1.0, 0.0, 0.0, 3000, 1.0, 10),
    "m": (250, 1000, 2200, 3300, 0.35, 0.0, 0.0, 3000, 1.0, 6),
    "n": (250, 1600, 2500, 3400, 0.35, 0.0, 0.0, 3000, 1.0, 6),
    "l": (360, 1100, 2600, 3400, 0.6, 0.0, 0.0, 3000, 1.0, 6),
    "r": (400, 1200, 1600, 3200, 0.6, 0.0, 0.0, 3000, 1.0, 6),
    "w": (290, 700, 2200, 3200, 0.5, 0.0, 0.0, 3000, 1.0, 6),
    "j": (270, 2200, 2900, 3600, 0.5, 0.0, 0.0, 3000, 1.0, 6),
    "h": (500, 1500, 2500, 3500, 0.0, 0.25, 0.0, 3000, 1.0, 6),
    "s": (350, 1700, 2600, 3600, 0.0, 0.0, 1.0, 6000, 0.4, 10),
    "sh": (350, 1800, 2500, 3500, 0.0, 0.0, 0.9, 3500, 0.5, 10),
    "f": (350, 1200, 2300, 3400, 0.0, 0.0, 0.25, 6000, 1.5, 9),
    "z": (350, 1700, 2600, 3600, 0.3, 0.0, 0.7, 6000, 0.35, 7),
    "v": (350, 1200, 2300, 3400, 0.4, 0.0, 0.15, 6000, 1.5, 6),
    "p": (350, 900, 2200, 3300, 0.0, 0.0, 0.0, 1000, 1.2, 6),
    "p+": (450, 1000, 2300, 3400, 0.0, 0.1, 0.5, 1000, 1.2, 2),
    "t": (350, 1700, 2600, 3500, 0.0, 0.0, 0.0, 4500, 0.7, 5),
    "t+": (450, 1700, 2600, 3500, 0.0, 0.1, 1.2, 4500, 0.7, 3),
    "k": (350, 1900, 2300, 3400, 0.0, 0.0, 0.0, 2000, 0.6, 6),
    "k+": (450, 1900, 2300, 3400, 0.0, 0.1, 0.9, 2000, 0.6, 3),
    "b": (250, 900, 2200, 3300, 0.15, 0.0, 0.0, 1000, 1.2, 5),
    "b+": (350, 1000, 2300, 3400, 0.4, 0.0, 0.4, 1000, 1.2, 1),
    "d": (250, 1700, 2600, 3500, 0.15, 0.0, 0.0, 4500, 0.7, 4),
    "d+": (350, 1700, 2600, 3500, 0.4, 0.0, 0.8, 4500, 0.7, 1),
    "g": (250, 1900, 2300, 3400, 0.15, 0.0, 0.0, 2000, 0.6, 4),
    "g+": (350, 1900, 2300, 3400, 0.4, 0.0, 0.6, 2000, 0.6, 2),
    "pause": (450, 1400, 2400, 3400, 0.0, 0.0, 0.0, 3000, 1.0, 20),
}
_NAMES = list(_PHONES)
_TABLE = np.array(list(_PHONES.values()))
_NONE = -1


def _rows(*phones: str) -> NDArray[np.int64]:
    """Two table rows for each phone: closure and burst of a stop, or the phone and none."""
    return np.array(
        [[_NAMES.index(p), _NAMES.index(p + "+") if p + "+" in _NAMES else _NONE] for p in phones]
    )


_VOWELS = _rows(*"iIEVAOUu", "ae", "er")[:, 0]
_ONSETS = _rows(*"mnlrwjhsfzvptkbdgtsdnk", "sh")
_CODAS = _rows(*"mnlrszfvtkdgnts")
_PAUSE = _NAMES.index("pause")
_NASALS = [_NAMES.index(p) for p in "mn"]
_UPPER = np.array([4500.0, 5500.0, 6500.0, 7500.0])  # F5 to F8, Hz
_BANDWIDTHS = np.array([80.0, 110.0, 160.0, 220.0, 300.0, 350.0, 400.0, 450.0])  # F1 to F8, Hz


@dataclass(frozen=True)
class Speaker:
    """The properties of a person: the larynx, the vocal tract and the habits of speech."""

    f0: float  # mean pitch, Hz
    f0_range: float  # deviation of the pitch contour, semitones
    jitter: float  # relative deviation of pitch from frame to frame
    breath: float  # noise beside the voice, as an amplitude
    tilt: float  # slope of the voice source, dB an octave
    bandwidth: float  # factor on all bandwidths
    formants: Floats  # (phones, 4): formant targets, Hz
    upper: Floats  # (4,): F5 to F8, the same for all phones, Hz
    friction: float  # factor on the centres of friction
    rate: float  # factor on the lengths of phones


def draw_speaker(rng: np.random.Generator) -> Speaker:
    """Draw a person; pitch and tract length are correlated, as in women and men."""
    high = float(rng.random() < 0.5)
    tract = math.exp(rng.normal(0.14 * high, 0.045))
    offsets = rng.normal(0.0, [0.03, 0.035, 0.035, 0.035])
    habits = rng.normal(0.0, 0.035, (len(_TABLE), 4))
    return Speaker(
        f0=math.exp(rng.normal(math.log(118.0) + 0.54 * high, 0.14)),
        f0_range=rng.uniform(1.5, 3.5),
        jitter=rng.uniform(0.003, 0.02),
        breath=math.exp(rng.normal(math.log(0.06), 0.5)),
        tilt=rng.normal(-4.0, 1.0),
        bandwidth=math.exp(rng.normal(0.0, 0.2)),
        formants=_TABLE[:, :4] * tract * np.exp(offsets + habits),
        upper=_UPPER * tract * np.exp(rng.normal(0.0, 0.03, 4)),
        friction=tract**0.5 * math.exp(rng.normal(0.0, 0.06)),
        rate=math.exp(rng.normal(0.0, 0.12)),
    )


@dataclass(frozen=True)
class Session:
    """The properties of a recording, independent of the speaker."""

    pitch: float  # shift of the mean pitch, semitones
    tilt: float  # shift of the source's slope (effort), dB an octave
    response: Floats  # (K,): amplitude of microphone and line at each frequency
    noise_slope: float  # colour of the noise, dB an octave
    snr: float  # speech over noise, dB, before the microphone
    floor: float  # hiss of the line, dB below the speech, after the microphone
    decay: float  # reverberation time, s
    wet: float  # reverberation's share, as an amplitude; 0 in a dry room


def draw_session(rng: np.random.Generator) -> Session:
    """Draw a recording: band limits, a smooth random response, noise and a room."""
    freqs = _FREQUENCIES.double().numpy()
    axis = np.log1p(freqs / 700.0) / math.log1p(freqs[-1] / 700.0)
    orders = np.arange(1, 7)
    weights = rng.normal(0.0, 3.0 / np.sqrt(orders))
    smooth = np.cos(np.pi * np.outer(axis, orders)) @ weights
    low = math.exp(rng.uniform(math.log(40.0), math.log(250.0)))
    high = math.exp(rng.uniform(math.log(4500.0), math.log(12000.0)))
    octaves_below = np.log2(low / np.maximum(freqs, 10.0)).clip(0.0)
    octaves_above = np.log2(np.maximum(freqs, 10.0) / high).clip(0.0)
    decibels = smooth - 12.0 * octaves_below - 25.0 * octaves_above
    return Session(
        pitch=rng.normal(0.0, 0.5),
        tilt=rng.normal(0.0, 0.7),
        response=10.0 ** (decibels / 20.0),
        noise_slope=rng.uniform(-8.0, 0.0),
        snr=rng.uniform(5.0, 25.0),
        floor=rng.uniform(35.0, 55.0),
        decay=rng.uniform(0.1, 0.6),
        wet=max(0.0, rng.uniform(-0.5, 0.6)),
    )


def speak(speaker: Speaker, session: Session, frames: int, rng: np.random.Generator) -> Tensor:
    """Synthesise an utterance as recorded in a session.

    Args:
        speaker: The speaker.
        session: The conditions of the recording.
        frames: Length in frames of 10 ms, at least `MIN_FRAMES`.
        rng: Chooses the syllables, the melody and the noise.

    Returns:
        float32 waveform (N,) at 16 kHz and any level, with N // 160 + 1 == frames.
    """
    samples = (frames - 1) * HOP + HOP // 2
    phones = _babble(speaker, frames, rng)
    stress = np.repeat(rng.normal(0.0, 2.5, frames // 20 + 1), 20)[:frames]
    gain = 10.0 ** (_glide(stress, 21) / 20.0)
    gains = _tensor(_glide(_TABLE[phones, 4:7], _FAST) * gain[:, None])
    voiced, breathy, rubbed = gains[:, :1], gains[:, 1:2], gains[:, 2:]  # (T, 1) each
    hum = _stft(_pulses(_melody(speaker, session, phones, rng), samples))
    air = _stft(rng.standard_normal(samples, dtype=np.float32))
    # Reuse the noise, shifted by half an utterance: as good as new noise, and faster to make.
    ambient = air.roll(frames // 2, 0)
    hum *= _slope(speaker.tilt + session.tilt) * _DISPERSION
    hum *= voiced
    hum += air * (speaker.breath * voiced + breathy)
    hum *= _resonances(speaker, phones)
    hum += air * (_friction(speaker, phones) * rubbed)
    wave = _istft(_record(hum, ambient, session, rng))[:samples]
    return _reverberate(wave, session, rng) if session.wet else wave


def _babble(speaker: Speaker, frames: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Random syllables: the phone (row of the table) at each of the (T,) frames."""
    n = frames // 8 + 2
    onset = np.where(rng.random((n, 1)) < 0.85, rng.choice(_ONSETS, n), _NONE)
    vowel = rng.choice(_VOWELS, (n, 1))
    coda = np.where(rng.random((n, 1)) < 0.35, rng.choice(_CODAS, n), _NONE)
    pause = np.where(rng.random((n, 1)) < 0.08, _PAUSE, _NONE)
    line = np.hstack([onset, vowel, coda, pause]).ravel()
    line = line[line != _NONE]
    stretch = np.exp(rng.normal(0.0, 0.25, len(line))) * speaker.rate
    lengths = np.maximum(1, np.rint(_TABLE[line, 9] * stretch)).astype(np.int64)
    return np.resize(np.repeat(line, lengths), frames)


def _melody(
    speaker: Speaker, session: Session, phones: NDArray[np.int64], rng: np.random.Generator
) -> Floats:
    """Pitch in Hz at each of the (T,) frames: it falls within a phrase, with random accents."""
    frames = len(phones)
    start = np.maximum.accumulate(np.where(phones == _PAUSE, np.arange(frames), 0))
    falling = 1.0 - (np.arange(frames) - start) / 100.0
    accents = np.interp(
        np.arange(frames),
        np.arange(0, frames + 25, 25),
        rng.normal(0.0, 1.0, len(range(0, frames + 25, 25))),
    )
    semitones = speaker.f0_range * (0.7 * falling.clip(-1.0) + _glide(accents, 15)) + session.pitch
    return speaker.f0 * 2.0 ** (semitones / 12.0) * (1.0 + rng.normal(0.0, speaker.jitter, frames))


def _pulses(f0: Floats, samples: int) -> NDArray[np.float32]:
    """Pulses at the pitch `f0` (T,) in Hz: (N,) of mean power 1.

    A pulse between two samples is split between them; rounding its place would add noise.
    """
    step = np.interp(np.arange(samples), np.arange(len(f0)) * HOP, f0.clip(50.0, 500.0))
    phase = np.cumsum(step) / SAMPLE_RATE
    periods = np.floor(phase)
    at = np.flatnonzero(np.diff(periods)) + 1
    late = (phase[at] - periods[at]) * SAMPLE_RATE / step[at]
    height = np.sqrt(SAMPLE_RATE / step[at])
    pulses = np.zeros(samples, np.float32)
    pulses[at] = height * (1.0 - late)
    pulses[at - 1] += height * late
    return pulses


def _resonances(speaker: Speaker, phones: NDArray[np.int64]) -> Tensor:
    """Amplitude (T, K) of the vocal tract: a cascade of eight resonances, each 1 at 0 Hz.

    |H|^-2 of a resonance at F with bandwidth B is x^2 + (q - 2) x + 1, x = (f/F)^2, q = (B/F)^2.
    """
    widths = speaker.bandwidth * _BANDWIDTHS
    square = _FREQUENCIES.square()
    damping = 1.0 + _glide(np.isin(phones, _NASALS).astype(np.float64), _FAST)[:, None]
    moving = _glide(speaker.formants[phones], _SLOW)  # (T, 4)
    power = torch.ones(())
    for centres, width in ((speaker.upper[None], widths[4:]), (moving, widths[:4] * damping)):
        scale = _tensor(centres**-2.0)
        middle = _tensor(np.square(width / centres) - 2.0)
        for n in range(4):
            x = square * scale[:, n : n + 1]
            power = power * (x + middle[:, n : n + 1]).mul_(x).add_(1.0)
    return power.rsqrt()


def _friction(speaker: Speaker, phones: NDArray[np.int64]) -> Tensor:
    """Amplitude (T, K) of the noise band of fricatives and bursts, a bell over log frequency."""
    centre = np.log2(_TABLE[phones, 7] * speaker.friction)
    bell = _tensor(_glide(np.stack([centre, _TABLE[phones, 8]], 1), _FAST))
    octaves = _FREQUENCIES.clamp(min=20.0).log2()
    return ((octaves - bell[:, :1]) / bell[:, 1:]).square_().mul_(-0.5).exp_()


def _record(speech: Tensor, noise: Tensor, session: Session, rng: np.random.Generator) -> Tensor:
    """Add noise of the room, the response of the microphone and hiss of the line: spectra (T, K).

    The gains of noise and hiss are relative to the power of the speech with its pauses.
    """
    loudness = math.sqrt(float(torch.view_as_real(speech).square().mean()))
    loudness /= math.sqrt(float(torch.view_as_real(noise).square().mean()))
    colour = _slope(session.noise_slope)
    level = loudness * 10.0 ** (-session.snr / 20.0) / math.sqrt(float(colour.square().mean()))
    hiss = loudness * 10.0 ** (-session.floor / 20.0)
    response = _tensor(session.response)
    swell = _tensor(10.0 ** (_glide(rng.normal(0.0, 6.0, (len(speech), 1)), 41) / 20.0))
    speech *= response
    speech += noise * (level * colour * response * swell + hiss)
    return speech


def _reverberate(wave: Tensor, session: Session, rng: np.random.Generator) -> Tensor:
    """Convolve (N,) with a direct path and noise that decays by 60 dB in `session.decay` s."""
    length = int(session.decay * SAMPLE_RATE)
    tail = rng.standard_normal(length) * np.exp(np.arange(length) * (-math.log(1000.0) / length))
    tail *= session.wet / math.sqrt(np.square(tail).sum())
    tail[0] += 1.0
    size = -(-(len(wave) + length) // 4096) * 4096
    spectrum = np.fft.rfft(wave.numpy(), size) * np.fft.rfft(tail.astype(np.float32), size)
    return _tensor(np.fft.irfft(spectrum, size)[: len(wave)])


def _stft(wave: NDArray[np.float32]) -> Tensor:
    """(N,) waveform -> (T, K) complex spectra."""
    signal = torch.from_numpy(wave)
    return torch.stft(signal, _FFT, HOP, window=_WINDOW, center=True, return_complex=True).T


def _istft(spectra: Tensor) -> Tensor:
    """(T, K) complex spectra -> (160 T + 80,) waveform by overlap-add, up to a constant factor."""
    parts = (torch.fft.irfft(spectra, _FFT) * _WINDOW).view(-1, 3, HOP)
    blocks = torch.zeros(len(parts) + 2, HOP)
    for n in range(3):
        blocks[n : n + len(parts)] += parts[:, n]
    return blocks.flatten()[_FFT // 2 :]


def _slope(decibels: float) -> Tensor:
    """Amplitude (K,) changing by `decibels` an octave above 200 Hz, flat below."""
    octaves = (_FREQUENCIES.clamp(min=200.0) / 200.0).log2()
    return 10.0 ** (decibels * octaves / 20.0)


def _tensor(values: NDArray[np.floating[Any]]) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))


@lru_cache(maxsize=8)
def _bump(width: int) -> Floats:
    bump = np.hanning(width + 2)[1:-1]
    share: Floats = bump / bump.sum()
    return share


def _glide(track: Floats, width: int) -> Floats:
    """Smooth a track (T,) or (T, C) over `width` frames with a Hann bump; ends keep their value."""
    ends = width // 2
    padded = np.concatenate([track[:1].repeat(ends, 0), track, track[-1:].repeat(ends, 0)])
    lines = padded.reshape(len(padded), -1).T
    smooth: Floats = np.stack([np.convolve(line, _bump(width), "valid") for line in lines], 1)
    return smooth.reshape(track.shape)
