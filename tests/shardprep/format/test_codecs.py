"""Both codecs decode what they encoded, in formats that other readers know, and notice damage."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shardprep.format import codecs
from shardprep.format.manifest import CodecInfo

CODECS = [CodecInfo("none"), CodecInfo("zstd", 3, 4)]
DTYPES = ["<f2", "<f4"]


def matrix(frames: int, mels: int, dtype: str) -> NDArray[Any]:
    rng = np.random.default_rng(frames)
    return rng.normal(-5, 4, (frames, mels)).cumsum(0).astype(dtype)


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
@pytest.mark.parametrize("dtype", DTYPES)
@given(frames=st.integers(1, 40), mels=st.integers(1, 9))
@settings(deadline=None, max_examples=40)
def test_encoding_and_decoding_is_exact(
    codec: CodecInfo, dtype: str, frames: int, mels: int
) -> None:
    mel = matrix(frames, mels, dtype)
    again = codecs.decode(codecs.encode(mel, codec), codec)
    assert again.dtype == mel.dtype
    np.testing.assert_array_equal(again, mel)


@pytest.mark.parametrize("dtype", DTYPES)
def test_uncompressed_payload_has_the_bytes_that_numpy_saves(dtype: str) -> None:
    mel = matrix(11, 3, dtype)
    buffer = io.BytesIO()
    np.save(buffer, mel)
    assert codecs.encode(mel, CodecInfo("none")) == buffer.getvalue()
    assert buffer.getvalue()[codecs.NPY_HEADER_BYTES :] == mel.tobytes()


def test_header_keeps_its_size_for_the_largest_shapes() -> None:
    header = codecs.npy_header((2**63, 4096), np.dtype("<f4"))
    assert len(header) == codecs.NPY_HEADER_BYTES


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_zstd_reader_inflates_the_whole_payload(dtype: str) -> None:
    mel = matrix(11, 3, dtype)
    payload = codecs.encode(mel, CodecInfo("zstd", 3, 4))
    plain = zstandard.ZstdDecompressor().stream_reader(payload, read_across_frames=True).read()
    np.testing.assert_array_equal(np.load(io.BytesIO(plain)), mel)


def frame_spans(member: Any, frames: int, chunk: int) -> tuple[Any, Any]:
    """Begin and size of the zstd frame of each chunk, from the seek table."""
    begin = len(member) - int(codecs.table_bytes_from_end(np.array([frames]), chunk)[0])
    packed = [size for size, _ in struct.iter_unpack("<II", member[begin:-9].tobytes())]
    ends = np.cumsum(packed)
    return ends[:-1], np.array(packed[1:])


@given(frames=st.integers(1, 30), chunk=st.integers(1, 9), data=st.data())
@settings(deadline=None, max_examples=60)
def test_a_range_of_chunks_inflates_to_exactly_its_frames(
    frames: int, chunk: int, data: st.DataObject
) -> None:
    mel = matrix(frames, 3, "<f2")
    member = np.frombuffer(codecs.encode(mel, CodecInfo("zstd", 3, chunk)), np.uint8)
    first = data.draw(st.integers(0, (frames - 1) // chunk))
    last = data.draw(st.integers(first, (frames - 1) // chunk))
    at, nbytes = frame_spans(member, frames, chunk)
    sizes = np.array([len(mel[c * chunk : (c + 1) * chunk]) * 6 for c in range(first, last + 1)])
    wanted = slice(first, last + 1)
    inflated = codecs.inflate_many(member, at[wanted], nbytes[wanted], sizes)
    assert b"".join(map(bytes, inflated)) == mel[first * chunk : (last + 1) * chunk].tobytes()
    for wrong in (sizes + 1, sizes - 1):
        with pytest.raises(ValueError, match="."):
            codecs.inflate_many(member, at[wanted], nbytes[wanted], wrong)


@given(
    sizes=st.lists(st.integers(1, 5000), min_size=0, max_size=40),
    noise=st.integers(1, 256),
)
@settings(deadline=None, max_examples=60)
def test_inflated_frames_follow_one_another_however_much_they_shrank(
    sizes: list[int], noise: int
) -> None:
    # Frames that shrink much are inflated into several pieces of memory.
    rng = np.random.default_rng(0)
    plain = [rng.integers(0, noise, size, np.uint8).tobytes() for size in sizes]
    packed = [zstandard.ZstdCompressor().compress(part) for part in plain]
    member = np.frombuffer(b"".join(packed), np.uint8)
    nbytes = np.array([len(part) for part in packed], np.int64)
    at = np.cumsum(nbytes) - nbytes
    inflated = codecs.inflate_joined(member, at, nbytes, np.array(sizes, np.int64))
    assert bytes(inflated) == b"".join(plain)


def test_payload_ends_with_a_seek_table_of_the_seekable_format() -> None:
    mel = matrix(10, 3, "<f4")
    payload = codecs.encode(mel, CodecInfo("zstd", 3, 4))
    count, descriptor, magic = struct.unpack("<IBI", payload[-9:])
    assert (count, descriptor, magic) == (4, 0, 0x8F92EAB1)
    begin = len(payload) - 9 - 8 * count - 8
    assert struct.unpack("<II", payload[begin : begin + 8]) == (0x184D2A5E, 8 * count + 9)
    at, plain = 0, b""
    for packed_size, plain_size in struct.iter_unpack("<II", payload[begin + 8 : -9]):
        frame = zstandard.ZstdDecompressor().decompress(payload[at : at + packed_size])
        assert len(frame) == plain_size
        at, plain = at + packed_size, plain + frame
    assert at == begin
    np.testing.assert_array_equal(np.load(io.BytesIO(plain)), mel)


def test_every_flipped_bit_of_a_zstd_frame_is_noticed() -> None:
    mel = matrix(8, 3, "<f2")
    member = codecs.encode(mel, CodecInfo("zstd", 3, 8))
    at, nbytes = frame_spans(np.frombuffer(member, np.uint8), 8, 8)
    unseen = []
    for bit in range(8 * int(at[0]), 8 * int(at[0] + nbytes[0])):
        hurt = np.frombuffer(member, np.uint8).copy()
        hurt[bit // 8] ^= 1 << bit % 8
        try:
            inflated = codecs.inflate_many(hurt, at, nbytes, np.array([mel.nbytes]))
        except ValueError:
            continue
        if b"".join(map(bytes, inflated)) != mel.tobytes():
            unseen.append(bit)
    assert unseen == []


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
@pytest.mark.parametrize("keep", [0, 1, 60, 130, 0.5])
def test_truncated_payload_is_a_value_error(codec: CodecInfo, keep: float) -> None:
    payload = codecs.encode(matrix(40, 5, "<f4"), codec)
    cut = int(len(payload) * keep) if isinstance(keep, float) else keep
    with pytest.raises(ValueError, match="."):
        codecs.decode(payload[:cut], codec)


def test_pickled_array_is_never_loaded() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="pickle"):
        codecs.decode(buffer.getvalue(), CodecInfo("none"))


def test_zstd_is_inflated_to_no_more_than_the_limit() -> None:
    codec = CodecInfo("zstd", 3, 64)
    mel = np.zeros((4000, 40), "<f2")
    payload = codecs.encode(mel, codec)
    np.testing.assert_array_equal(codecs.decode(payload, codec, mel.nbytes), mel)
    with pytest.raises(ValueError, match="more than"):
        codecs.decode(payload, codec, mel.nbytes - 1)
    with pytest.raises(ValueError, match="inflates to more than"):
        codecs.decode(payload, codec, 1000)


@pytest.mark.parametrize(
    ("shape", "dtype", "what"),
    [
        ("(3, 5)", "<f2", "0 bytes follow its npy header, expected 30"),
        (f"({2**60}, 5)", "<f2", "more than"),
        ("(3,)", "<f2", "not a matrix in C order"),
        ("(-3, -5)", "<f2", "not a matrix in C order"),
        ("(3, 5)", "|O", "not numbers; nothing is ever unpickled"),
        ("(3, 5)", "|S4", "not numbers"),
        ("(3, 5)", "(2,)<f2", "not"),
        ("(" * 60, "<f2", "damaged"),
        ("__import__('os')", "<f2", "."),
    ],
)
def test_false_npy_header_is_a_value_error(shape: str, dtype: str, what: str) -> None:
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}"
    data = b"\x93NUMPY\x01\x00" + struct.pack("<H", 182) + text.encode().ljust(181) + b"\n"
    with pytest.raises(ValueError, match=what):
        codecs.decode(data, CodecInfo("none"))
