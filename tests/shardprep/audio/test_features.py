"""Features are those of the recipe, whatever the file and however it comes."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from shardprep import FeatureRecipe, audio_features, log_mel, read_audio
from shardprep.audio import decode, features
from shardprep.audio.mel import MelStream, filterbank
from shardprep.audio.silence import SilenceRemover
from tests.shardprep.audio.oracle import (
    levelled,
    mels,
    speech,
    triangles,
    unwav,
    wav,
    without_silence,
)
from tests.shardprep.conftest import as_read

HOMEWORK = FeatureRecipe()
PLAIN = FeatureRecipe(peak_db=None, silence_level=None)


def encoded(samples: Any, rate: int, kind: str, subtype: str | None = None) -> bytes:
    """A recording by soundfile, in pieces: libsndfile crashes on long ones of Vorbis."""
    out = io.BytesIO()
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    with soundfile.SoundFile(out, "w", rate, channels, subtype, format=kind) as file:
        for at in range(0, len(samples), 4096):
            file.write(samples[at : at + 4096])
    return out.getvalue()


def m4a(samples: Any, rate: int) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=rate)
        stream.bit_rate = 128_000
        planes = np.ascontiguousarray(np.atleast_2d(samples.T), np.float32)
        frame = av.AudioFrame.from_ndarray(
            planes, format="fltp", layout="mono" if len(planes) == 1 else "stereo"
        )
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    return out.getvalue()


@pytest.mark.parametrize("seed", range(3))
def test_features_are_the_recipe_in_float64(seed: int) -> None:
    data = wav(speech(3, seed))
    expected = mels(without_silence(levelled(unwav(data))))
    found = audio_features(data, HOMEWORK)
    assert found.dtype == np.float32
    assert len(expected) < len(mels(unwav(data)))
    assert np.abs(found - expected).max() < 1e-4


def test_bins_far_below_the_loudest_are_exact() -> None:
    # A pure tone: other bins lie 90 dB below, where float32 has no digits left.
    tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(8000) / 16_000)
    data = wav(tone)
    np.testing.assert_allclose(audio_features(data, PLAIN), mels(unwav(data)), atol=1e-4)
    # Also at another level, which multiplies every sample.
    expected = mels(without_silence(levelled(unwav(data))))
    np.testing.assert_allclose(audio_features(data, HOMEWORK), expected, atol=1e-4)


def test_triangles_are_those_of_htk() -> None:
    np.testing.assert_allclose(filterbank(HOMEWORK), triangles(), atol=1e-9)


def test_slaneys_triangles_have_unit_area() -> None:
    recipe = FeatureRecipe(n_fft=8192, win_length=400, mel_scale="slaney", norm="slaney")
    bank = filterbank(recipe)
    np.testing.assert_allclose(bank.sum(axis=1) * 16_000 / 8192, 1, rtol=0.01)
    peaks = bank.argmax(axis=1) * 16_000 / 8192
    # Linear below 1,000 Hz, logarithmic above.
    low, high = peaks[peaks < 900], peaks[peaks > 1100]
    assert np.ptp(np.diff(low)) <= 4
    assert np.ptp(np.diff(np.log(high))) < 0.01


def test_magnitudes_are_the_roots_of_powers_in_a_bin_of_one_frequency() -> None:
    options: dict[str, Any] = {"n_mels": 1, "f_min": 990.0, "f_max": 1010.0, "n_fft": 1600}
    options |= {"win_length": 400, "peak_db": None, "silence_level": None}
    samples = speech(0.3).astype(np.float32)
    power = log_mel(samples, FeatureRecipe(**options))
    magnitude = log_mel(samples, FeatureRecipe(**options, power=1.0))
    above = power > -18
    np.testing.assert_allclose(magnitude[above] * 2, power[above], atol=0.01)


@pytest.mark.parametrize(
    ("n_fft", "win", "hop"), [(400, 400, 160), (512, 400, 160), (401, 300, 700), (16, 2, 1)]
)
@given(cuts=st.lists(st.integers(1, 900), max_size=8))
def test_mels_do_not_depend_on_how_samples_are_cut(
    n_fft: int, win: int, hop: int, cuts: list[int]
) -> None:
    recipe = FeatureRecipe(n_fft=n_fft, win_length=win, hop_length=hop, n_mels=4)
    samples = speech(0.2).astype(np.float32)
    stream = MelStream(recipe)
    parts = [stream.push(part) for part in np.split(samples, np.cumsum(cuts))]
    found = np.concatenate([*parts, stream.end()])
    np.testing.assert_array_equal(found, log_mel(samples, recipe))
    assert len(found) == (len(samples) + 2 * (n_fft // 2) - n_fft) // hop + 1


@given(
    runs=st.lists(st.tuples(st.booleans(), st.integers(1, 12)), max_size=12),
    cuts=st.lists(st.integers(1, 20), max_size=8),
)
def test_silence_is_removed_however_samples_are_cut(
    runs: list[tuple[bool, int]], cuts: list[int]
) -> None:
    samples = np.array([0.5 if loud else 0.001 for loud, n in runs for _ in range(n)], np.float32)
    samples *= np.where(np.arange(len(samples)) % 2, 1, -1)
    remover = SilenceRemover(0.01, 5)
    parts = [remover.push(part) for part in np.split(samples, np.cumsum(cuts))]
    found = np.concatenate([*parts, remover.end()])
    np.testing.assert_array_equal(found, without_silence(samples, 5).astype(np.float32))


def test_a_long_recording_is_decoded_twice_with_the_same_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(wav(speech(4, rate=44_100), 44_100))
    whole = audio_features(path, HOMEWORK)
    opened: list[Any] = []
    monkeypatch.setattr(features, "_KEPT", 1000)
    monkeypatch.setattr(decode, "_BLOCK", 777)
    real = features.open_recording
    monkeypatch.setattr(features, "open_recording", lambda p: opened.append(p) or real(p))
    np.testing.assert_array_equal(audio_features(path, HOMEWORK), whole)
    assert opened == [path, path]


@pytest.mark.parametrize("rate", [8000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(
    ("encode", "most"),
    [
        (lambda x, r: encoded(x, r, "WAV"), 0.03),
        (lambda x, r: encoded(x, r, "WAV", "FLOAT"), 0.03),
        (lambda x, r: encoded(x, r, "FLAC"), 0.03),
        (lambda x, r: encoded(x, r, "AIFF"), 0.03),
        (lambda x, r: encoded(x, r, "OGG", "VORBIS"), 0.6),
        (lambda x, r: encoded(x, r, "MP3"), 0.9),
        (m4a, 0.9),
    ],
    ids=["wav", "wav-float", "flac", "aiff", "ogg", "mp3", "m4a"],
)
def test_every_codec_rate_and_channel_gives_nearly_the_same(
    encode: Callable[[Any, int], bytes], most: float, channels: int, rate: int
) -> None:
    tones = speech(1, rate=rate) + np.random.default_rng(1).normal(0, 0.02, rate)
    samples = np.stack([tones] * channels, axis=1) if channels > 1 else tones
    recipe = FeatureRecipe(f_max=3400.0, silence_level=None)
    expected = audio_features(tones.astype(np.float32), recipe, rate=rate)
    found = audio_features(encode(samples, rate), recipe)
    # Codecs of AAC and MP3 add samples at both ends; the loudest frames are compared.
    shift = min(range(16), key=lambda n: np.abs(_overlap(expected, found, n)).mean())
    assert np.abs(_overlap(expected, found, shift)).mean() < most


def _overlap(expected: Any, found: Any, shift: int) -> Any:
    count = min(len(expected), len(found) - shift) - 2
    return found[shift : shift + count] - expected[:count]


def test_channels_are_averaged() -> None:
    left, right = speech(1, 1), speech(1, 2)
    data = wav(np.stack([left, right], axis=1))
    samples = read_audio(data, sample_rate=16_000)
    np.testing.assert_allclose(samples, (left + right) / 2, atol=5e-5)
    floats = np.stack([left, right]).astype(np.float32)
    np.testing.assert_allclose(
        read_audio(floats, sample_rate=16_000), (left + right) / 2, atol=1e-6
    )


@pytest.mark.parametrize("dtype", ["int16", "int32", "float64"])
def test_samples_of_any_type_are_fractions_of_full_scale(dtype: str) -> None:
    samples = speech(0.5)
    own = samples
    if dtype.startswith("int"):
        own = (samples * np.iinfo(dtype).max).astype(dtype)
    np.testing.assert_allclose(
        read_audio(own.astype(dtype), sample_rate=16_000), samples, atol=1e-4
    )


def test_a_sample_is_quiet_by_its_exact_value() -> None:
    # The two levels are one value in float32.
    samples = np.full(9000, 0.1, np.float32)
    samples[:300] = samples[-300:] = 0.9
    quiet = FeatureRecipe(peak_db=None, silence_level=float(samples[300]) + 1e-12)
    loud = FeatureRecipe(peak_db=None, silence_level=float(samples[300]))
    assert len(audio_features(samples, loud)) == 9000 // 160 + 1
    assert len(audio_features(samples, quiet)) == 600 // 160 + 1


def test_a_rate_of_0_is_no_rate() -> None:
    with pytest.raises(ValueError, match="the rate is 0 Hz, expected 1000 to"):
        audio_features(np.full(9000, 0.5), HOMEWORK, rate=0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_samples_of_any_size_are_taken_or_refused(dtype: str) -> None:
    huge = np.full((2, 9000), 3e38, dtype)
    stereo = encoded(huge.T.astype(np.float32), 16_000, "WAV", "FLOAT")
    for place in (stereo, huge, np.full(9000, 1e12), np.full(9000, np.nan)):
        with pytest.raises(ValueError, match="not finite"):
            audio_features(place, HOMEWORK)
    # As integers in a file of floats; and the smallest number there is.
    expected = audio_features(np.full(9000, 0.5), HOMEWORK)
    for size in (32_000, 1.4e-45):
        found = audio_features(np.full(9000, size), HOMEWORK)
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
def test_a_piece_is_cut_at_its_samples(kind: str) -> None:
    samples = speech(3, rate=8000)
    data = encoded(samples, 8000, kind)
    whole = read_audio(data, sample_rate=8000)
    piece = read_audio(data, sample_rate=8000, start=0.5, end=2.25)
    np.testing.assert_array_equal(piece, whole[4000:18000])
    np.testing.assert_array_equal(read_audio(data, sample_rate=8000, start=2.5), whole[20_000:])


def test_a_kind_that_cannot_be_entered_in_the_middle_is_read_from_the_beginning() -> None:
    data = encoded(speech(1, rate=8000), 8000, "WAV", "GSM610")
    whole = read_audio(data, sample_rate=8000)
    piece = read_audio(data, sample_rate=8000, start=0.25, end=0.5)
    np.testing.assert_array_equal(piece, whole[2000:4000])


def test_a_piece_of_a_damaged_flac_is_refused() -> None:
    data = encoded(speech(4), 16_000, "FLAC")[:30_000]
    with pytest.raises(ValueError, match=r"cannot be decoded from sample 48000 on \(\w"):
        audio_features(data, HOMEWORK, start=3)


@pytest.mark.parametrize("time", [-1.0, 86_401.0, 1e308, math.inf, math.nan])
def test_a_time_that_no_recording_has_is_refused(time: float) -> None:
    for audio in (wav(speech(0.5)), speech(0.5)):
        for times in ({"start": time}, {"end": time}):
            with pytest.raises(ValueError, match="s is no time of a recording"):
                read_audio(audio, sample_rate=16_000, **times)


def test_values_are_rounded_to_the_type_of_the_shards() -> None:
    data = wav(speech(1))
    half = audio_features(data, HOMEWORK, dtype="float16")
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half, audio_features(data, HOMEWORK).astype(np.float16))


def test_levels_of_uint8_are_those_of_the_whole_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_BLOCK", 3_000)
    data = np.concatenate([speech(0.5), 0.01 * speech(0.5)])
    found = audio_features(data, HOMEWORK, dtype="uint8")
    assert found.dtype == np.float32
    expected = as_read(audio_features(data, HOMEWORK), "uint8")
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(found)) <= 256


TRUNCATED = "is cut off"
FAULTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "no bytes": (lambda: b"", "is empty"),
    "one sample": (lambda: wav(np.full(1, 0.1)), "too short: it has 1 samples"),
    "too short for a frame": (lambda: wav(np.full(200, 0.1)), "too short: it has 200 samples"),
    "zeros": (lambda: wav(np.zeros(5000)), "silent"),
    "no sample": (lambda: wav(np.zeros(0)), "has no samples"),
    "a click in silence": (lambda: wav(np.eye(1, 9000, 4000)[0]), "without its silence"),
    "NaN": (lambda: encoded(np.full(500, np.nan), 16_000, "WAV", "FLOAT"), "not finite"),
    "infinity": (lambda: encoded(np.full(500, np.inf), 16_000, "WAV", "FLOAT"), "not finite"),
    "half a wav": (lambda: wav(speech(1))[:16_000], TRUNCATED),
    "half an mp3": (lambda: encoded(speech(4), 16_000, "MP3")[:9000], TRUNCATED),
    "half a flac": (lambda: encoded(speech(4), 16_000, "FLAC")[:30_000], "cannot be decoded|cut"),
    "half an m4a": (lambda: m4a(speech(4), 16_000)[:9000], "no recording"),
    "a flac of 10^9 samples": (lambda: claiming(10**9), "cannot be decoded|cut off"),
    "a wav of 4 GB": (lambda: wav_claiming(0xF000_0000), TRUNCATED),
    "a rate of 10^9": (lambda: wav_rate(10**9), "samples a second|no recording"),
    "a rate of 1": (lambda: wav_rate(1), "samples a second"),
    "65,535 channels": (lambda: wav_channels(65_535), "channels|no recording"),
    "text": (lambda: b"path,speaker\na,b\n" * 50, "is no recording: "),
    "a page": (lambda: b"<!DOCTYPE html><html>404</html>", "is no recording: "),
    "noise": (lambda: np.random.default_rng(0).bytes(5000), "no recording|decoded|no samples|cut"),
    "a pointer of Git LFS": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
        "is no recording: ",
    ),
}


def claiming(samples: int) -> bytes:
    """A short flac whose header claims so many samples."""
    data = bytearray(encoded(speech(1), 16_000, "FLAC"))
    # 36 bits in bytes 21 to 25 of the stream's information.
    data[21] = (data[21] & 0xF0) | (samples >> 32)
    data[22:26] = (samples & 0xFFFF_FFFF).to_bytes(4, "big")
    return bytes(data)


def wav_claiming(size: int) -> bytes:
    data = bytearray(wav(speech(0.1)))
    data[40:44] = size.to_bytes(4, "little")
    return bytes(data)


def wav_rate(rate: int) -> bytes:
    data = bytearray(wav(speech(0.1)))
    data[24:28] = rate.to_bytes(4, "little")
    return bytes(data)


def wav_channels(channels: int) -> bytes:
    data = bytearray(wav(speech(0.1)))
    data[22:24] = channels.to_bytes(2, "little")
    return bytes(data)


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_recording_is_refused_in_words(name: str, tmp_path: Path) -> None:
    make, words = FAULTS[name]
    data = make()
    with pytest.raises(ValueError, match=words):
        audio_features(data, HOMEWORK)
    (tmp_path / "a.wav").write_bytes(data)
    with pytest.raises(ValueError, match=words):
        audio_features(tmp_path / "a.wav", HOMEWORK)


def test_a_wav_from_a_pipe_whose_header_knows_no_size_is_whole() -> None:
    for size in (0xFFFF_FFFF, 0xFFFF_FFFF - 44):
        samples = read_audio(wav_claiming(size), sample_rate=16_000)
        np.testing.assert_array_equal(samples, unwav(wav(speech(0.1))).astype(np.float32))


@pytest.mark.parametrize("channels", [1, 2])
def test_a_flac_from_a_pipe_whose_header_knows_no_length_is_whole(channels: int) -> None:
    data = bytearray(encoded(np.stack([speech(1)] * channels, axis=-1), 16_000, "FLAC"))
    one = read_audio(bytes(data), sample_rate=16_000)
    data[21], data[22:26] = data[21] & 0xF0, bytes(4)
    np.testing.assert_array_equal(read_audio(bytes(data), sample_rate=16_000), one)
    piece = read_audio(bytes(data), sample_rate=16_000, start=0.25, end=0.5)
    np.testing.assert_array_equal(piece, one[4000:8000])
    with pytest.raises(ValueError, match="before the piece"):
        read_audio(bytes(data), sample_rate=16_000, start=0.5, end=2)
    with pytest.raises(ValueError, match="cannot be decoded|no samples|no recording"):
        read_audio(bytes(data[:2000]), sample_rate=16_000)


@pytest.mark.parametrize(
    "listed",
    [
        "ffconcat version 1.0\n#\0\nfile secret.wav\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#\0\n#EXTINF:9,\nsecret.wav\n#EXT-X-ENDLIST\n",
    ],
    ids=["concat", "HLS"],
)
def test_no_other_file_is_read(
    listed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret.wav").write_bytes(wav(speech(1)))
    (tmp_path / "a.wav").write_text(listed)
    monkeypatch.chdir(tmp_path)
    # The concat list works where every reader is allowed: the file is well formed.
    if listed.startswith("ffconcat"):
        with av.open("a.wav", format="concat") as container:
            assert container.streams.audio
    for place in ("a.wav", tmp_path / "a.wav", listed.encode()):
        with pytest.raises(ValueError, match="no recording"):
            audio_features(place, HOMEWORK)


def video(codec: str) -> bytes:
    """A second of speech, and of video."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        picture = container.add_stream(codec, rate=25, width=64, height=64, pix_fmt="yuv420p")
        sound = container.add_stream("aac", rate=16_000, layout="mono")
        frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        planes = speech(1)[None].astype(np.float32)
        heard = av.AudioFrame.from_ndarray(planes, format="fltp", layout="mono")
        heard.sample_rate = 16_000
        for packet in (*picture.encode(frame), *picture.encode(None)):
            container.mux(packet)
        for packet in (*sound.encode(heard), *sound.encode(None)):
            container.mux(packet)
    return out.getvalue()


def test_the_sound_of_a_video_is_taken() -> None:
    assert len(read_audio(video("mpeg4"), sample_rate=16_000)) == pytest.approx(17_000, abs=1500)


def test_raw_aac_is_whole_though_its_length_is_a_guess() -> None:
    out = io.BytesIO()
    with av.open(out, "w", format="adts") as container:
        stream = container.add_stream("aac", rate=16_000, layout="mono")
        # Loud and then silent: the guess by the bytes of the beginning is too long.
        samples = np.concatenate((np.random.default_rng(0).normal(0, 0.2, 32_000), [0] * 64_000))
        planes = samples[None].astype(np.float32)
        frame = av.AudioFrame.from_ndarray(planes, format="fltp", layout="mono")
        frame.sample_rate = 16_000
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    found = read_audio(out.getvalue(), sample_rate=16_000)
    assert len(found) == pytest.approx(96_000, abs=3000)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.wav")
    with pytest.raises(OSError, match="not a regular file"):
        audio_features(tmp_path / "a.wav", HOMEWORK)


def test_a_disk_that_fails_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(data := wav(speech(1)))

    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 8000:
                raise OSError(5, "Input/output error")
            return super().read(min(2000, size or 0))

    monkeypatch.setattr(decode, "open_regular", lambda path: Failing(data))
    with pytest.raises(OSError, match="Input/output error"):
        audio_features(path, HOMEWORK)


def test_an_mp3_does_not_depend_on_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(speech(3), 16_000, "MP3")
    assert data[:1] == b"\xff"
    expected = read_audio(data, sample_rate=16_000)
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        np.testing.assert_array_equal(expected, file.read(dtype="float32"))
    # Where libsndfile looks for a resource fork.
    (tmp_path / ".AppleDouble").mkdir()
    (tmp_path / "._").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(read_audio(data, sample_rate=16_000), expected)
    with pytest.raises(ValueError, match="is cut off"):
        read_audio(data[:9000], sample_rate=16_000)


def test_a_missing_file_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        audio_features(tmp_path / "a.wav", HOMEWORK)


_PEAK = """
import sys
import shardprep
from shardprep.audio.recipe import FeatureRecipe
before = shardprep.audio_features(open(sys.argv[1], "rb").read(), FeatureRecipe())
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) // 1024
start = peak()
try:
    print(len(shardprep.audio_features(sys.argv[2], FeatureRecipe(), dtype="float16")))
except ValueError as fault:
    print(fault)
print(peak() - start)
"""


def grown(folder: Path, data: bytes) -> tuple[str, int]:
    """What features of a recording say, and the MB that a process grew by for them."""
    (folder / "short.wav").write_bytes(wav(speech(1)))
    (folder / "own").write_bytes(data)
    command = [sys.executable, "-c", _PEAK, str(folder / "short.wav"), str(folder / "own")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said, size = done.stdout.splitlines()[-2:]
    return said, int(size)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["a flac of 10^9 samples", "a wav of 4 GB", "65,535 channels", "half an mp3", "noise"]
)
def test_hostile_recordings_take_little_memory(tmp_path: Path, name: str) -> None:
    said, size = grown(tmp_path, FAULTS[name][0]())
    assert not said.isdecimal()
    assert size < 200


@pytest.mark.slow
def test_three_hours_take_bounded_memory(tmp_path: Path) -> None:
    # One byte a sample, and quick to encode.
    recording = encoded(np.tile(speech(60), 180), 16_000, "WAV", "ULAW")
    said, size = grown(tmp_path, recording)
    assert int(said) > 500_000
    # The log-mels, twice; the samples alone would take 659 MB.
    assert size < 300
