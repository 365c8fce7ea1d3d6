"""A crafted or damaged zip file gives what torch.load gives, or an error that says why."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from shardprep.source.pt.pickle import usual_call
from shardprep.source.pt.tensor import read_tensor
from shardprep.source.pt.zip import read_records

DTYPES = (torch.float16, torch.float32, torch.float64)
Records = dict[str, bytes]


def saved(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def records_of(data: bytes) -> Records:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(
    records: list[tuple[str, bytes]],
    *,
    bare: str = "",
    order: Callable[[list[bytes]], list[bytes]] = list,
) -> bytes:
    """A file with these records, in the layout of torch.save, with the right checksums.

    Args:
        records: Name and content of each.
        bare: Name of a record that shall have no header.
        order: Rearranges the entries of the directory.
    """
    body, entries = b"", []
    for name, content in records:
        sums = struct.pack("<LLL", zlib.crc32(content), len(content), len(content))
        padding = -(len(body) + 34 + len(name)) % 64
        head = struct.pack("<HH", len(name), padding + 4) + name.encode()
        filler = b"FB" + struct.pack("<H", padding) + b"Z" * padding
        entry = b"PK\1\2" + struct.pack("<HHHHHH", 0, 0, 0x808, 0, 0, 0) + sums
        entry += struct.pack("<HHHHHLL", len(name), 0, 0, 0, 0, 0, len(body)) + name.encode()
        fixed = b"PK\3\4" + struct.pack("<HHHHHLLL", 0, 0x808, 0, 0, 0, 0, 0, 0)
        body += b"" if name == bare else fixed + head + filler
        body += content + b"PK\7\x08" + sums
        entries.append(entry)
    directory = b"".join(order(entries))
    count, where = len(records), (len(directory), len(body))
    end = b"PK\6\6" + struct.pack("<QHHLLQQQQ", 44, 0x31E, 45, 0, 0, count, count, *where)
    end += b"PK\6\7" + struct.pack("<LQL", 0, sum(where), 1)
    end += b"PK\5\6" + struct.pack("<HHHHLLH", 0, 0, count, count, *where, 0)
    return body + directory + end


def loaded(data: bytes) -> NDArray[Any]:
    matrix: NDArray[Any] = torch.load(io.BytesIO(data), weights_only=True).numpy()
    return matrix


def assert_usual_and_as_loaded(data: bytes) -> None:
    assert usual_call(bytes(read_records(data)["data.pkl"])) is not None
    found, expected = read_tensor(data).values(), loaded(data)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert found.flags.c_contiguous
    assert found.tobytes() == expected.tobytes()


def read_or_refused(data: bytes) -> NDArray[Any] | None:
    """What is read of a file; None if the file is refused."""
    try:
        return read_tensor(data).values()
    except ValueError:
        return None


@given(st.integers(1, 300), st.integers(1, 90), st.sampled_from(DTYPES), st.integers(0, 2**32 - 1))
def test_matrix_is_what_torch_loads(
    frames: int, n_mels: int, dtype: torch.dtype, seed: int
) -> None:
    # Any bits at all: NaNs with a payload and subnormal numbers too.
    rng = np.random.default_rng(seed)
    numbers = torch.frombuffer(bytearray(rng.bytes(frames * n_mels * dtype.itemsize)), dtype=dtype)
    assert_usual_and_as_loaded(saved(numbers.view(frames, n_mels)))


@pytest.mark.parametrize(
    "shape", [(1, 1), (255, 1), (256, 1), (1, 256), (65535, 1), (65536, 1), (2, 40_000)]
)
def test_sizes_of_every_width_are_read(shape: tuple[int, int]) -> None:
    assert_usual_and_as_loaded(saved(torch.randn(shape)))


def test_archive_has_the_name_of_the_file(tmp_path: Any) -> None:
    torch.save(torch.randn(5, 4), tmp_path / "uttr-0123_a.b.pt")
    assert_usual_and_as_loaded((tmp_path / "uttr-0123_a.b.pt").read_bytes())


def test_files_of_earlier_releases_have_fewer_records_and_longer_keys() -> None:
    records = records_of(saved(torch.randn(5, 4)))
    program = records["archive/data.pkl"].replace(b"\1\0\0\x000q", b"\x0e\0\0\x0094872093184160q")
    older = [
        ("archive/data.pkl", program),
        ("archive/data/94872093184160", records["archive/data/0"]),
        ("archive/version", b"3\n"),
    ]
    assert_usual_and_as_loaded(packed(older))


def test_writer_of_this_test_writes_as_torch_does() -> None:
    data = saved(torch.randn(9, 4))
    assert packed(list(records_of(data).items())) == data


def test_no_flipped_bit_changes_the_numbers() -> None:
    mel = torch.randn(3, 2)
    data = bytearray(saved(mel))
    refused = 0
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        found = read_or_refused(bytes(data))
        data[bit // 8] ^= 1 << bit % 8
        if found is None:
            refused += 1
        else:
            # A bit that means nothing, as of the time in the header of a record.
            np.testing.assert_array_equal(found, mel.numpy())
    assert refused > 2 * len(data)


def pickled(old: bytes, new: bytes) -> Callable[[Records], None]:
    def edit(records: Records) -> None:
        assert old in records["archive/data.pkl"]
        records["archive/data.pkl"] = records["archive/data.pkl"].replace(old, new)

    return edit


def changed(name: str, content: bytes) -> Callable[[Records], None]:
    return lambda records: records.update({name: content})


def renamed(old: str, new: str) -> Callable[[Records], None]:
    def edit(records: Records) -> None:
        content = dict(records)
        records.clear()
        records.update({name.replace(old, new): content[name] for name in content})

    return edit


def without(name: str) -> Callable[[Records], None]:
    return lambda records: records.pop(name) and None


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("it was unpickled",)


# Of a matrix (3, 5), 15 numbers: K\x0f, K\x03, K\x05, and the strides K\x05 and K\x01.
CRAFTED: dict[str, Callable[[Records], None]] = {
    "more numbers than there are": pickled(b"cpuq\x04K\x0f", b"cpuq\x04K\x10"),
    "fewer numbers than there are": pickled(b"cpuq\x04K\x0f", b"cpuq\x04K\x0e"),
    "offset": pickled(b"QK\0", b"QK\1"),
    "more frames than there are": pickled(b"K\x03K\x05\x86", b"K\x04K\x05\x86"),
    "negative sizes": pickled(
        b"K\x03K\x05\x86", b"J" + struct.pack("<i", -3) + b"J" + struct.pack("<i", -5) + b"\x86"
    ),
    "negative sizes and stride": pickled(
        b"K\x03K\x05\x86q\x06K\x05",
        b"J\xfd\xff\xff\xffJ\xfb\xff\xff\xff\x86q\x06J\xfb\xff\xff\xff",
    ),
    "huge sizes": pickled(b"K\x03K\x05\x86", 2 * b"J\xff\xff\xff\x7f" + b"\x86"),
    "other element type": pickled(b"FloatStorage", b"DoubleStorage"),
    "integers": pickled(b"FloatStorage", b"IntStorage"),
    "key of another length": pickled(b"X\1\0\0\x000", b"X\2\0\0\x000"),
    "key of no record": pickled(b"X\1\0\0\x000", b"X\1\0\0\x001"),
    "key that leads elsewhere": pickled(b"X\1\0\0\x000", b"X\4\0\0\x00../0"),
    "more after the end": pickled(b"Rq\x0b.", b"Rq\x0b.."),
    "another program": changed("archive/data.pkl", pickle.dumps(Malicious(), 2)),
    "program after this one": pickled(b"Rq\x0b.", b"Rq\x0b" + pickle.dumps(Malicious(), 2)),
    "numbers cut short": changed("archive/data/0", bytes(59)),
    "order that is unknown": changed("archive/byteorder", b"middle"),
    "no archive": renamed("archive/", ""),
    "no numbers": without("archive/data/0"),
    "no program": without("archive/data.pkl"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_file_with_true_checksums_is_refused(name: str) -> None:
    records = records_of(saved(torch.randn(3, 5)))
    assert read_or_refused(packed(list(records.items()))) is not None
    CRAFTED[name](records)
    assert read_or_refused(packed(list(records.items()))) is None


# Of the same matrix: what torch.load reads too.
UNUSUAL: dict[str, Callable[[Records], None]] = {
    "fewer frames than there are": pickled(b"K\x03K\x05\x86", b"K\x02K\x05\x86"),
    "other strides": pickled(b"K\x05K\x01\x86", b"K\x01K\x03\x86"),
    "stride 0": pickled(b"K\x05K\x01\x86", b"K\x00K\x01\x86"),
    "big-endian": changed("archive/byteorder", b"big"),
    "unknown record": changed("archive/other", b""),
    "archive with an odd name": renamed("archive/", "a\\b/"),
    "archive with a long name": renamed("archive/", "a" * 256 + "/"),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_file_is_what_torch_loads(name: str) -> None:
    records = records_of(saved(torch.randn(3, 5)))
    UNUSUAL[name](records)
    data = packed(list(records.items()))
    np.testing.assert_array_equal(read_tensor(data).values(), loaded(data))


def test_record_that_occurs_twice_is_refused() -> None:
    records = list(records_of(saved(torch.randn(3, 5))).items())
    for name in ("archive/data.pkl", "archive/data/0", "archive/version"):
        with pytest.raises(ValueError, match="twice"):
            read_records(packed([*records, (name, dict(records)[name])]))


@pytest.mark.parametrize("bare", ["archive/version", "archive/data/0"])
def test_record_without_a_header_is_refused(bare: str) -> None:
    records = list(records_of(saved(torch.randn(3, 5))).items())
    with pytest.raises(ValueError, match="its record .* is cut off"):
        read_records(packed(records, bare=bare))


def test_directory_may_stand_in_another_order() -> None:
    data = saved(torch.randn(3, 5))
    other = packed(list(records_of(data).items()), order=lambda entries: entries[::-1])
    assert read_records(other) == read_records(data)
