"""Any dense tensor of floats is what torch.load gives; any other program is refused, not run."""

from __future__ import annotations

import io
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardprep.source.pt.tensor import read_tensor

DTYPES = (torch.float16, torch.float32, torch.float64, torch.bfloat16)


def saved(value: Any, *, older: bool = False, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=not older, **options)
    return file.getvalue()


def rewritten(data: bytes, edit: Callable[[str, bytes], bytes], method: int = 0) -> bytes:
    """A zip file with other contents and the right checksums."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, edit(name, old.read(name)))
    return out.getvalue()


@given(
    frames=st.integers(1, 20),
    n_mels=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    change=st.sampled_from(["plain", "transposed", "rows", "columns", "parameter", "expanded"]),
    older=st.booleans(),
)
@settings(deadline=None, max_examples=80)
def test_any_dense_tensor_is_what_torch_loads(
    frames: int, n_mels: int, dtype: torch.dtype, change: str, older: bool
) -> None:
    mel = torch.randn(frames, n_mels).to(dtype)
    variants = {
        "transposed": lambda: mel.T.contiguous().T,
        "rows": lambda: torch.cat([mel, mel, mel])[1 : frames + 1],
        "columns": lambda: torch.cat([mel, mel], 1)[:, 1 : n_mels + 1],
        "parameter": lambda: torch.nn.Parameter(mel, requires_grad=frames % 2 == 0),
        "expanded": lambda: mel[:1].clone().expand(frames, n_mels),
    }
    data = saved(variants.get(change, lambda: mel)(), older=older)
    expected = torch.load(io.BytesIO(data), weights_only=True).detach()
    found = read_tensor(data)
    np.testing.assert_array_equal(found.values(), expected.double().numpy())
    assert found.repeats == (change == "expanded" and frames > 1)


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_protocol_of_pickles_is_read(dtype: torch.dtype, protocol: int, older: bool) -> None:
    values = {
        "plain": torch.randn(300, 4).to(dtype),
        "rows": torch.randn(9, 4).to(dtype)[6:],
        "transposed": torch.randn(4, 9).to(dtype).T,
        "parameter": torch.nn.Parameter(torch.randn(3, 4).to(dtype)),
    }
    for value in values.values():
        data = saved(value, older=older, pickle_protocol=protocol)
        expected = torch.load(io.BytesIO(data), weights_only=False).detach().double().numpy()
        np.testing.assert_array_equal(read_tensor(data).values(), expected)


def test_a_file_of_python_2_is_read() -> None:
    """Python 2 wrote all text as byte strings."""
    old = saved(torch.arange(12.0).view(3, 4), older=True)
    text = re.compile(rb"X(.)\0\0\0", re.DOTALL)
    found = read_tensor(text.sub(lambda found: b"U" + found[1], old))
    np.testing.assert_array_equal(found.values(), np.arange(12.0).reshape(3, 4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_file_of_a_big_endian_machine_is_read(dtype: torch.dtype) -> None:
    value = torch.randn(5, 4).to(dtype)
    bits = value.view(
        torch.int64
        if dtype == torch.float64
        else torch.int32
        if dtype == torch.float32
        else torch.int16
    ).numpy()

    def swapped(name: str, was: bytes) -> bytes:
        if name.endswith("byteorder"):
            return b"big"
        return bits.byteswap().tobytes() if name.endswith("data/0") else was

    data = rewritten(saved(value), swapped)
    expected = torch.load(io.BytesIO(data), weights_only=True)
    assert torch.equal(expected, value)
    np.testing.assert_array_equal(read_tensor(data).values(), value.double().numpy())


OTHER_CONTENTS: dict[str, tuple[Any, str]] = {
    "list of numbers": ([[0.5] * 40] * 700, r"a list, not a tensor; save torch\.tensor\(values\)"),
    "tuple": ((torch.zeros(3, 4), 16000), "a tuple, not a tensor; save the tensor alone"),
    "number": (5, "a value of type int, not a tensor"),
    "None": (None, "None, not a tensor"),
    "rare element type": (torch.zeros(3, 4, dtype=torch.uint16), r"rare .*; save tensor\.float"),
    "checkpoint": (
        {"step": 1, "model": torch.nn.Linear(3, 4).state_dict()},
        "a dict, not a tensor; save the tensor alone",
    ),
    "text": ("mel", "a str, not a tensor"),
    "NumPy array": (np.zeros((3, 4)), r"a NumPy array, .*; save torch\.from_numpy\(array\)"),
    "dict of arrays": ({"mel": np.zeros((3, 4))}, "a NumPy array"),
    "dict of text": ({"a": "b", "c": "d", "e": "f", "g": "h"}, "its keys: 'a', 'c', 'e', ...\\)"),
    "empty dict": ({}, "a dict, not a tensor; save the tensor alone"),
    "weights": (torch.nn.Linear(3, 4).state_dict(), r"a model \(a state_dict\)"),
    "model": (torch.nn.Linear(3, 4), "a model, not a tensor"),
}


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("name", OTHER_CONTENTS)
def test_what_is_saved_instead_of_a_tensor_is_named(name: str, older: bool) -> None:
    value, said = OTHER_CONTENTS[name]
    with pytest.raises(ValueError, match=f"^holds .*{said}"):
        read_tensor(saved(value, older=older))


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_bare_pickle_is_named_by_what_it_holds(protocol: int) -> None:
    for value, said in (([1.0], "a list"), (np.zeros(3), "a NumPy array"), ({"a": 1}, "a dict")):
        with pytest.raises(ValueError, match=f"^holds {said}, not a tensor"):
            read_tensor(pickle.dumps(value, protocol))


def test_negated_views_are_negated() -> None:
    imaginary = torch.randn(3, 4, dtype=torch.complex64).conj().imag
    assert imaginary.is_neg()
    np.testing.assert_array_equal(
        read_tensor(saved(imaginary)).values(), imaginary.resolve_neg().numpy()
    )


@pytest.mark.parametrize("older", [False, True])
def test_numbers_beyond_the_file_are_never_read(older: bool) -> None:
    # K\x0f is the count of numbers, K\x03 the count of frames.
    data = saved(torch.zeros(3, 5), older=older)
    for old, new in [
        (b"cpuq\x04K\x0f", b"cpuq\x04K\xff"),
        (b"K\x03K\x05\x86", b"K\xf0K\x05\x86"),
        (b"QK\x00K\x03", b"QK\x09K\x03"),
    ]:
        assert old in data
        forged = data.replace(old, new)
        if not older:
            forged = rewritten(data, lambda name, was, o=old, n=new: was.replace(o, n))
        with pytest.raises(ValueError, match="loaded safely: it"):
            read_tensor(forged)


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02cbuiltins\nbytearray\nJ\x00\xe4\x0bT\x85R.",
        b"\x80\x02ctorch\nFloatStorage\nJ\x00\xe4\x0bT\x85R.",
        b"\x80\x02cos\nsystem\nX\x04\0\0\0true\x85R.",
        b"\x80\x02}ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"\x80\x02" + b"(" * 100_000 + b".",
        b"\x80\x02t.",
        b"\x80\x020.",
        b"\x80\x02h\x05.",
        b"\x80\x02]" + b"\x85" * 30_000 + b".",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xff.",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
        b"I" + b"9" * 100_000 + b"\n.",
        b"X\xff\xff\xff\xffa.",
        # Python warns of this escape, which would be an error here.
        b"S'\\q'\n.",
        pickle.dumps(np.zeros(3)),
        b"",
    ],
    ids=range(16),
)
def test_a_pickle_of_anything_else_is_refused(program: bytes) -> None:
    forged = rewritten(
        saved(torch.zeros(3, 5)), lambda name, was: program if name.endswith(".pkl") else was
    )
    for data in (forged, program):
        with pytest.raises(
            ValueError,
            match=r"^(not a tensor file (that can be loaded safely|of torch.save): |"
            r"holds a (NumPy array|tuple), not a tensor|is text|is empty|ends early)",
        ):
            read_tensor(data)


def test_compressed_records_and_too_many_records_are_refused() -> None:
    data = saved(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="is compressed, which torch.save never does"):
        read_tensor(rewritten(data, lambda name, was: was, zipfile.ZIP_DEFLATED))
    flood = io.BytesIO()
    with zipfile.ZipFile(flood, "w") as archive:
        for number in range(5000):
            archive.writestr(f"a/{number}", b"")
    with pytest.raises(ValueError, match="has 5000 records"):
        read_tensor(flood.getvalue())


def test_a_false_directory_is_refused() -> None:
    data = saved(torch.zeros(3, 5))
    for at in range(len(data) - 22, len(data)):
        for value in (0, 1, 255):
            hurt = bytearray(data)
            hurt[at] = value
            try:
                np.testing.assert_array_equal(read_tensor(bytes(hurt)).values(), np.zeros((3, 5)))
            except ValueError as error:
                assert "tensor" in str(error) or "ends early" in str(error)  # noqa: PT017
    entries = data.index(b"PK\1\2")
    size = len(data) - 98 - entries
    end = struct.pack("<4sHHHHLLH", b"PK\5\6", 0, 0, 12, 12, 2 * size, entries, 0)
    with pytest.raises(ValueError, match="twice"):
        read_tensor(data[: entries + size] + data[entries : entries + size] + end)
