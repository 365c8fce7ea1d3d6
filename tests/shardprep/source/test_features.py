"""Features are right, of the right shape, finite and undamaged; or there is an error."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shardprep import BuildOptions, StorageError, build_shards
from shardprep.source.features import Expected, load_features

KINDS = ("float32", "float16", "bfloat16", "float64", "strided", "parameter", "older format")


def write(path: Path, mel: torch.Tensor, kind: str) -> torch.Tensor:
    """Save `mel` as `kind`; returns what was saved."""
    variants = {
        "float16": mel.half(),
        "bfloat16": mel.bfloat16(),
        "float64": mel.double(),
        "strided": mel.T.contiguous().T,
        "parameter": torch.nn.Parameter(mel),
    }
    value = variants.get(kind, mel)
    torch.save(value, path, _use_new_zipfile_serialization=kind != "older format")
    return value.detach()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_floating_tensor_loads_as_float32(tmp_path: Path, kind: str) -> None:
    value = write(tmp_path / "a.pt", torch.randn(12, 40), kind)
    loaded = load_features(tmp_path / "a.pt", Expected(40, 12))
    assert loaded.dtype == np.float32
    assert loaded.flags.c_contiguous
    np.testing.assert_array_equal(loaded, value.float().numpy())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_float64_beyond_float32_is_not_finite(tmp_path: Path, value: float) -> None:
    torch.save(torch.full((3, 4), value, dtype=torch.float64), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="not finite"):
        load_features(tmp_path / "a.pt", Expected(4, 3))


def test_plain_file_is_read_without_importing_torch(tmp_path: Path) -> None:
    torch.save(torch.randn(5, 4), tmp_path / "a.pt")
    script = (
        "import sys, pathlib, shardprep.build.writer;"
        "from shardprep.source.features import Expected, load_features;"
        "load_features(pathlib.Path(sys.argv[1]), Expected(4, 5));"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script, tmp_path / "a.pt"]).returncode == 0


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "strided"])
def test_flipped_bit_never_gives_other_features(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.pt"
    mel = write(path, torch.randn(3, 2), kind).float().numpy()
    data, faults = bytearray(path.read_bytes()), 0
    for at in range(len(data)):
        bit = 1 << at % 8
        data[at] ^= bit
        path.write_bytes(data)
        data[at] ^= bit
        try:
            # A byte that means nothing, such as the time in the header of a record.
            np.testing.assert_array_equal(load_features(path, Expected(2, 3)), mel)
        except ValueError:
            faults += 1
    assert faults > len(data) // 4


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_damaged_numbers_are_named_as_damage(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.pt"
    write(path, torch.zeros(30, 40), kind)
    data = bytearray(path.read_bytes())
    at = data.index(bytes(1200))
    data[at + 600] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"is damaged: .*a/data/0"):
        load_features(path, Expected(40, 30))


def test_file_written_without_checksums_is_taken_as_it_is(tmp_path: Path) -> None:
    mel = torch.randn(3, 4)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(mel, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    loaded = load_features(tmp_path / "a.pt", Expected(4, 3))
    np.testing.assert_array_equal(loaded, mel.numpy())


def test_every_truncation_is_a_fault(tmp_path: Path) -> None:
    torch.save(torch.randn(3, 2), tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    for size in range(0, len(data), 3):
        (tmp_path / "a.pt").write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"is empty \(0 bytes\)|ends early, after \d+ bytes"):
            load_features(tmp_path / "a.pt", Expected(2, 3))


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((3, 5), r"has shape \(3, 5\), expected \(mel_len, 4\)"),
        ((2, 4), "has 2 frames, but mel_len says 3"),
        ((30_000, 4), "has 30000 frames, but mel_len says 3"),
        ((3, 4, 1), r"has shape \(3, 4, 1\), expected \(mel_len, 4\)"),
    ],
)
@pytest.mark.parametrize("kind", ["float32", "parameter"])
def test_wrong_shape_has_the_same_message_for_every_kind_of_tensor(
    tmp_path: Path, shape: tuple[int, ...], said: str, kind: str
) -> None:
    mel = torch.zeros(shape)
    torch.save(torch.nn.Parameter(mel) if kind == "parameter" else mel, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=said):
        load_features(tmp_path / "a.pt", Expected(4, 3))


def test_a_view_that_claims_a_huge_size_is_not_copied(tmp_path: Path) -> None:
    torch.save(torch.zeros(1, 4).expand(1 << 40, 4), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=f"has {1 << 40} frames, but mel_len says 3"):
        load_features(tmp_path / "a.pt", Expected(4, 3))


@pytest.mark.parametrize("trouble", [OSError(errno.EIO, "I/O error"), MemoryError()])
def test_an_error_of_the_machine_is_not_a_fault_of_the_file(
    make_dataset: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trouble: Exception,
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise trouble

    monkeypatch.setattr("shardprep.source.features.read_tensor", fail)
    options = BuildOptions(workers=1, on_error="skip")
    with pytest.raises(StorageError, match=r"uttr-\w+\.pt: cannot be read"):
        build_shards(make_dataset(), tmp_path / "shards", options)
