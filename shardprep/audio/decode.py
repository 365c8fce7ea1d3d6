"""Opens a recording of any kind and gives its samples, block by block, mixed down to one channel.

soundfile (libsndfile) reads wav, flac, ogg, opus, mp3, aiff and others; PyAV (FFmpeg) reads m4a,
and whatever soundfile cannot open. Nothing is believed of what a header claims: memory is taken for
samples that have come, and a recording that ends before its header says is refused.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from shardprep.audio.recipe import LEAST_RATE, MOST_RATE
from shardprep.errors import needs
from shardprep.storage.local import open_regular
from shardprep.storage.sniff import sniff

Samples = NDArray[np.float32]
Place: TypeAlias = Path | bytes

MOST_HOURS = 24
_MOST_CHANNELS = 64
# Float files may have integers as samples; full scale is 1.
_LOUDEST = 1e12
_HEAD = 4096
# Kinds of files in which libsndfile finds a sample by its number.
_EXACT = ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC")
# Values that are decoded at a time, over all channels.
_BLOCK = 1 << 19
# What programs write as a size that they do not know yet, such as FFmpeg into a pipe.
_UNKNOWN_SIZE = 0xFFFF_0000
_SIZE = re.compile(r"data\s*:\s*(\d+) \(should be (\d+)\)")
# libsndfile says so of streams whose length it does not know, or more.
_UNKNOWN_FRAMES = 2**62
# A lossy codec adds samples at the beginning and at the end, which not all programs count.
_SLACK_SECONDS = 0.2
# FFmpeg has readers that open other files and URLs, which the file names (playlists): only these
# may read, and no video is decoded.
_READERS = (
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,eac3,flac,flv,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,mp3,"
    "mpegts,ogg,tta,w64,wav,wv"
)
_DECODERS = (
    "aac,ac3,adpcm_ima_qt,adpcm_ima_wav,adpcm_ms,alac,amrnb,amrwb,ape,eac3,flac,mp3,mp3float,opus,"
    "pcm_alaw,pcm_f32be,pcm_f32le,pcm_f64be,pcm_f64le,pcm_mulaw,pcm_s16be,pcm_s16le,pcm_s24be,"
    "pcm_s24le,pcm_s32be,pcm_s32le,pcm_s8,pcm_u8,tta,vorbis,wavpack,wmalossless,wmapro,wmav1,wmav2"
)
_FFMPEG = {
    "format_whitelist": _READERS,
    "codec_whitelist": _DECODERS,
    "protocol_whitelist": "none",
}


Blocks: TypeAlias = Callable[[int], tuple[int, Iterator[Samples]]]


class Recording:
    """A recording that is open.

    Args:
        rate: Its sample rate [Hz].
        channels: Its channels.
        blocks: Gives its samples, and where they begin: at the sample that is asked for if the kind
            of file allows, else at the first.

    Raises:
        ValueError: Rate or channels are out of all bounds.
    """

    def __init__(self, rate: int, channels: int, blocks: Blocks) -> None:
        if not LEAST_RATE <= rate <= MOST_RATE:
            raise ValueError(
                f"its header claims {rate} samples a second, expected {LEAST_RATE} to {MOST_RATE}"
            )
        if not 1 <= channels <= _MOST_CHANNELS:
            raise ValueError(
                f"its header claims {channels} channels, expected 1 to {_MOST_CHANNELS}"
            )
        self.rate = rate
        self._blocks = blocks

    def samples(self, start: float | None, end: float | None) -> Iterator[Samples]:
        """The samples of one channel in blocks (N,) float32; full scale is 1.

        Args:
            start: Where to begin [s]; None for the beginning.
            end: Where to end [s]; None for the end.

        Raises:
            ValueError: The recording is damaged, longer than `MOST_HOURS`, ends before `end`, or
                has a sample that is no number.
        """
        begin = sample_at(start or 0, self.rate)
        last = None if end is None else sample_at(end, self.rate)
        if last is not None and last <= begin:
            raise ValueError(f"the piece from {start or 0} s to {end} s has no samples")
        at, blocks = self._blocks(begin)
        for block in blocks:
            own = block[max(0, begin - at) : None if last is None else max(0, last - at)]
            at += len(block)
            if at > MOST_HOURS * 3600 * self.rate:
                raise ValueError(f"is longer than {MOST_HOURS} hours: cut it into pieces")
            check_finite(own)
            if len(own):
                yield own
            if last is not None and at >= last:
                return
        if at <= begin or (last is not None and last - at > _SLACK_SECONDS * self.rate):
            what = f"from {start or 0} s" + ("" if end is None else f" to {end} s")
            raise ValueError(f"ends at {at / self.rate:.2f} s, before the piece {what} does")


def sample_at(time: float, rate: int) -> int:
    """The sample of a time [s]. ValueError if no recording that is taken has it."""
    if not 0 <= time <= MOST_HOURS * 3600:
        raise ValueError(f"{time} s is no time of a recording, expected 0 s to {MOST_HOURS} hours")
    return round(time * rate)


def check_finite(samples: Samples) -> None:
    """ValueError if a sample (N,) is no number, or one that later steps cannot square."""
    # Not a number is not less than anything.
    if not np.abs(samples).max(initial=0) < _LOUDEST:
        raise ValueError("has samples that are not finite numbers (of less than 10^12)")


class _Tagged:
    """An MPEG stream behind an empty ID3 tag.

    libsndfile looks for a file beside one whose kind it does not see at once, under a name that
    begins with `._`: without a tag, what an mp3 gives would depend on the current folder.
    """

    _TAG = b"ID3\x04\0\0\0\0\0\x0a" + bytes(10)

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._at = 0

    @staticmethod
    def fits(head: bytes) -> bool:
        """Whether a file begins with a frame of MPEG audio."""
        return len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0

    def read(self, size: int = -1) -> bytes:
        end = None if size < 0 else self._at + size
        found = self._TAG[self._at : end]
        if end is None or end > len(self._TAG):
            self._file.seek(max(0, self._at - len(self._TAG)))
            found += self._file.read(-1 if end is None else size - len(found))
        self._at += len(found)
        return found

    def seek(self, offset: int, whence: int = 0) -> int:
        base = self._at if whence == 1 else 0
        if whence == 2:
            base = self._file.seek(0, 2) + len(self._TAG)
        if base + offset < 0:
            raise ValueError("before the beginning")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at


class _Watched:
    """A file whose reader, in C, cannot pass on the errors of the system.

    Attributes:
        error: The first of them.
    """

    def __init__(self, file: BinaryIO | _Tagged) -> None:
        self._file = file
        self.error: OSError | None = None

    def read(self, size: int = -1) -> bytes:
        try:
            return self._file.read(size)
        except OSError as error:
            self.error = self.error or error
            return b""

    def seek(self, offset: int, whence: int = 0) -> int:
        # A damaged header may lead to before the beginning.
        with contextlib.suppress(ValueError, OSError):
            self._file.seek(offset, whence)
        return self._file.tell()

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True


@contextlib.contextmanager
def open_recording(place: Place) -> Iterator[Recording]:
    """Open a recording.

    Args:
        place: A file, or its bytes.

    Raises:
        ValueError: It is no recording, or, also later, one that cannot be decoded.
        OSError: The machine refused, also later.
        MissingExtraError: The extra `audio` is not installed.
    """
    with needs("audio"):
        import soundfile
    with contextlib.ExitStack() as stack:
        if not isinstance(place, bytes):
            binary: BinaryIO = stack.enter_context(open_regular(place))
        else:
            binary = io.BytesIO(place)
        head = binary.read(_HEAD)
        _check_kind(head)
        binary.seek(0)
        file = _Watched(_Tagged(binary) if _Tagged.fits(head) else binary)
        try:
            try:
                opened = stack.enter_context(soundfile.SoundFile(file))
                if opened.format == "FLAC" and opened.frames >= _UNKNOWN_FRAMES:
                    # As encoders write to a pipe. libsndfile fails at the end of such.
                    file.seek(0)
                    found = stack.enter_context(_open_av(file, "FLAC of unknown length."))
                else:
                    found = Recording(
                        opened.samplerate, opened.channels, functools.partial(_read, opened)
                    )
            except soundfile.LibsndfileError as error:
                if file.error is None:
                    binary.seek(0)
                    file = _Watched(binary)
                fault = _brief(error).rpartition(": ")[2]
                found = stack.enter_context(_open_av(file, fault))
            yield found
        except ValueError:
            if file.error is not None:
                raise file.error from None
            raise


def _check_kind(head: bytes) -> None:
    """ValueError if a file is no recording, in words."""
    if not head:
        raise ValueError("is empty (0 bytes)")
    found = sniff(head)
    if found is not None and found.kind not in ("audio", "other"):
        raise ValueError(f"is no recording: {found.what}")


def _read(file: Any, begin: int) -> tuple[int, Iterator[Samples]]:
    """The samples of a recording that soundfile has opened; see `Recording`."""
    import soundfile

    sizes = _SIZE.search(file.extra_info)
    if sizes and int(sizes[1]) < _UNKNOWN_SIZE:
        raise ValueError(f"is cut off: has {sizes[2]} of the {sizes[1]} bytes that it claims")
    exact = file.format in _EXACT and begin < file.frames
    if not exact or not begin or not file.seekable():
        return 0, _blocks(file, 0)
    try:
        return file.seek(begin), _blocks(file, begin)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"cannot be decoded from sample {begin} on ({_brief(error)})") from None


def _blocks(file: Any, at: int) -> Iterator[Samples]:
    import soundfile

    length = max(1, _BLOCK // file.channels)
    while True:
        try:
            block = file.read(length, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise ValueError(f"cannot be decoded after {at} samples ({_brief(error)})") from None
        if not len(block):
            break
        at += len(block)
        yield _mono(block.T)
    slack = 0 if file.format in _EXACT else _SLACK_SECONDS * file.samplerate
    if at + slack < file.frames < _UNKNOWN_FRAMES:
        raise ValueError(f"is cut off: has {at} of the {file.frames} samples that it claims")
    if not at:
        raise ValueError("has no samples")


def _mono(channels: Samples) -> Samples:
    """The mean (N,) of channels (C, N)."""
    if len(channels) == 1:
        return np.ascontiguousarray(channels[0])
    # What is too large becomes infinite, and is refused.
    with np.errstate(over="ignore", invalid="ignore"):
        total = channels[0] + channels[1]
        for channel in channels[2:]:
            total += channel
    return np.asarray(total * np.float32(1 / len(channels)))


@contextlib.contextmanager
def _open_av(file: _Watched, fault: str) -> Iterator[Recording]:
    """Open a recording by PyAV; `fault` says why soundfile could not."""
    with needs("audio"):
        import av
    with contextlib.ExitStack() as stack:
        try:
            container = stack.enter_context(
                av.open(file, "r", options=_FFMPEG, metadata_errors="ignore")
            )
            if not container.streams.audio:
                raise ValueError("has no sound")
            stream = container.streams.audio[0]
            if stream.codec_context is None:
                raise ValueError("has sound of a codec that is not known")
            found = Recording(
                int(stream.rate or 0),
                int(stream.channels or 0),
                lambda _: (0, _read_av(container, stream)),
            )
        except av.error.FFmpegError as error:
            what = f"is no recording that can be read ({fault} {error.strerror}.)"
            raise ValueError(what) from None
        yield found


def _read_av(container: Any, stream: Any) -> Iterator[Samples]:
    import av

    rate = int(stream.rate)
    # In other kinds of files, FFmpeg guesses the duration by the size.
    known = stream.duration and "mp4" in container.format.name
    claimed = float(stream.duration * stream.time_base) if known else 0.0
    came = 0
    # Planar float of the same rate and channels: only the kind of number is changed.
    convert = av.AudioResampler(format="fltp")
    try:
        for frame in container.decode(stream):
            if frame.sample_rate != rate:
                raise ValueError("changes its sample rate in the middle")
            for part in convert.resample(frame):
                planes = np.asarray(part.to_ndarray(), np.float32)
                came += planes.shape[1]
                yield _mono(planes)
    except av.error.FFmpegError as error:
        raise ValueError(f"cannot be decoded after {came} samples ({_brief(error)})") from None
    if not came:
        raise ValueError("has no samples")
    if came / rate < claimed - _SLACK_SECONDS:
        raise ValueError(f"is cut off: has {came / rate:.2f} s of the {claimed:.2f} s it claims")


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
