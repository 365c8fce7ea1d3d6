"""A file that is no `.pt` file is named by what it is, with a way that works."""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shardprep.source.pt.tensor import read_tensor


def npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros((600, 40), np.float32))
    return file.getvalue()


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def archive(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as opened:
        for name in names:
            opened.writestr(name, b"x")
    return file.getvalue()


def tensor(**options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(torch.randn(300, 40), file, **options)
    return file.getvalue()


OTHERS: dict[str, tuple[bytes, str]] = {
    "npy": (npy(), r"is a NumPy file \(.npy\), not a tensor; torch.save\(torch.from_numpy\("),
    "npz": (npz(mel=np.zeros((3, 4))), r"is a NumPy archive \(.npz\).*numpy.load\(FILE\)\['mel'\]"),
    "zip": (
        archive("a/uttr-1.pt", "a/uttr-2.pt"),
        "archive of 2 files, such as 'a/uttr-1.pt'.*unp",
    ),
    "empty zip": (archive(), "is an empty zip archive|is a zip archive"),
    "WAV": (b"RIFF\x24\0\0\0WAVEfmt ", r"is audio \(WAV\), not a tensor; save its log-mels"),
    "CSV": (b"0.1,0.2,0.3\n" * 50, "is text that begins '0.1,0.2,0.3 .*', not a tensor; save a"),
    "JSON": (b'{"mel": [0.1]}', "is JSON text, not a tensor"),
    "JSON error": (b'{"error": {"message": "Quota exceeded"}}', r"server \('Quota exceeded'\)"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "run `git lfs pull`$"),
    "gzip": (b"\x1f\x8b\x08\0", r"is compressed with gzip; decompress it \(gunzip\)$"),
    "TorchScript": (
        archive("a/data.pkl", "a/code/a.py", "a/constants.pkl"),
        "is a TorchScript program, not a tensor",
    ),
    "safetensors": (
        b"\x40\0\0\0\0\0\0\0{" + b'"' * 63,
        "is a safetensors file, not a tensor; torch",
    ),
    "zeros": (bytes(9000), r"holds nothing but zero bytes \(9000\)"),
    "zeros at the end": (tensor()[:8192] + bytes(4096), "ends in 4096 zero bytes"),
    "zeros at the beginning": (bytes(4096) + tensor()[4096:], "begins with 4096 zero bytes"),
    "cut": (tensor()[:20_000], "ends early, after 20000 bytes, as after an aborted download"),
    "first bytes": (b"PK", "ends early, after 2 bytes"),
    "more after the end": (
        tensor() + b"\n\n",
        "goes on for 2 bytes after its end; copy or download",
    ),
    "line ends converted": (tensor().replace(b"\n", b"\r\n"), "was transferred as text, "),
    "read as text": (tensor().decode(errors="replace").encode(), "was transferred as text, .*Git"),
    "converted": (tensor().decode("latin-1").encode(), "was transferred as text, which changes"),
    "cut, older format": (
        tensor(_use_new_zipfile_serialization=False)[:200],
        "ends early, after 200 bytes",
    ),
    "first byte, older format": (b"\x80", "ends early, after 1 bytes"),
    "cut, a pickled array": (pickle.dumps(np.ones((60, 40)))[:200], "ends early, after 200 bytes"),
    "tar": (bytes(257) + b"ustar", "is a tar archive, not a tensor"),
    "cut within numbers, older format": (
        tensor(_use_new_zipfile_serialization=False)[:9000],
        "ends early, after 9000 bytes",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_kind_of_file_is_named(name: str) -> None:
    data, said = OTHERS[name]
    with pytest.raises(ValueError, match="^(is|ends|holds|begins|goes|was) ") as error:
        read_tensor(data)
    assert re.search(said, str(error.value))
    assert "pickle" not in str(error.value)
    assert "opcode" not in str(error.value)


def test_an_unknown_kind_of_file_is_told_by_its_first_bytes() -> None:
    with pytest.raises(
        ValueError, match=r"^not a tensor file of torch.save: .* bytes ff ff ff ff;"
    ):
        read_tensor(b"\xff" * 5000)


def test_the_way_that_a_reason_names_works(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(npy())
    torch.save(torch.from_numpy(np.load(path)), path)
    assert read_tensor(path.read_bytes()).numbers.shape == (600, 40)
    path.write_bytes(npz(mel=np.ones((3, 4))))
    torch.save(torch.from_numpy(np.load(path)["mel"]), path)
    assert read_tensor(path.read_bytes()).numbers.shape == (3, 4)
