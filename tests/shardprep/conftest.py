"""Fixtures that the tests of shardprep share."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from shardprep import BuildOptions, BuildReport, Split, build_shards, open_shards
from shardprep.storage import local

# From one frame up, around the lengths of a zstd chunk (64) and of a segment (128).
EDGE_LENGTHS = (1, 2, 31, 63, 64, 65, 100, 127, 128, 129, 191, 192, 193, 300, 517)
EDGE_MELS = 7


def write_source(root: Path, lengths: dict[str, Sequence[int]], test: Sequence[int] = ()) -> Path:
    """Write a data set of EDGE_MELS mels with utterances of exactly these lengths."""
    rng = np.random.default_rng(len(lengths))
    root.mkdir(parents=True)

    def utterance(name: str, length: int) -> dict[str, object]:
        mel = rng.normal(-5.0, 4.0, (length, EDGE_MELS)).astype(np.float32)
        torch.save(torch.from_numpy(mel), root / name)
        return {"feature_path": name, "mel_len": length}

    speakers = {
        speaker: [utterance(f"{speaker}-{n:03d}.pt", length) for n, length in enumerate(own)]
        for speaker, own in lengths.items()
    }
    entries = [utterance(f"test-{n:03d}.pt", length) for n, length in enumerate(test)]
    (root / "metadata.json").write_text(json.dumps({"n_mels": EDGE_MELS, "speakers": speakers}))
    if test:
        listed = {"n_mels": EDGE_MELS, "utterances": entries}
        (root / "testdata.json").write_text(json.dumps(listed))
    return root


def as_read(mel: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """What a set of an element type must give back of a matrix (T, F), value by value."""
    if dtype != "uint8":
        return mel.astype(dtype)
    low, high = float(mel.min()), float(mel.max())
    step = np.float32((high - low) / 255)
    if not step:
        return np.full_like(mel, low)
    levels = [[round((float(x) - low) / float(step)) for x in row] for row in mel]
    return np.array([[np.float32(low) + step * np.float32(q) for q in row] for row in levels])


@pytest.fixture(scope="session")
def edge_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with utterances of every length that is an edge case; not to be changed."""
    lengths = {"ann": EDGE_LENGTHS, "bob": EDGE_LENGTHS[::-1], "cleo": (40, 50, 60, 700, 1)}
    return write_source(tmp_path_factory.mktemp("edge") / "Dataset", lengths, EDGE_LENGTHS[:6])


@pytest.fixture(scope="session")
def edge_sets(edge_source: Path) -> dict[tuple[str, str], Path]:
    """Shards of `edge_source` by dtype and codec; not to be changed."""
    sets = {}
    for dtype in ("float16", "float32", "uint8"):
        for codec in ("none", "zstd"):
            sets[dtype, codec] = edge_source.parent / f"{dtype}-{codec}"
            options = BuildOptions(
                dtype=dtype,  # type: ignore[arg-type]
                codec=codec,  # type: ignore[arg-type]
                samples_per_shard=8,
                val_fraction=0.2,
                workers=1,
            )
            build_shards(edge_source, sets[dtype, codec], options)
    return sets


@pytest.fixture(scope="session")
def edge_set(edge_sets: dict[tuple[str, str], Path]) -> Path:
    """Shards of `edge_source` with the options that are the default."""
    return edge_sets["float16", "none"]


@pytest.fixture(scope="session")
def second_sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sets by codec that share the speaker bob, and some keys, with `edge_set`; not to be changed.

    They have other speakers too, before and after bob, and a file that the build left out.
    """
    root = tmp_path_factory.mktemp("second")
    lengths = {"abe": (33, 90), "bob": (45, 128, 300), "dora": (64, 64, 400, 20), "eve": (70, 95)}
    source = write_source(root / "Dataset", lengths, EDGE_LENGTHS[:5])
    (source / "test-002.pt").write_bytes(b"no tensor")
    for codec in ("none", "zstd"):
        options = BuildOptions(
            codec=codec,  # type: ignore[arg-type]
            samples_per_shard=4,
            val_fraction=0.2,
            on_error="skip",
            workers=1,
        )
        build_shards(source, root / codec, options)
    return {codec: root / codec for codec in ("none", "zstd")}


# Kills a program before its first, second, ... call to the operating system that changes a disk,
# each time in another folder, until it reaches its end. It is killed by SIGKILL: no handler, no
# clean-up. `act(subject, folder)` is the program, `prepare` runs before it without a kill, and
# DEADLY lists the calls.
KILLS = """
import os, shutil, signal, sys
from pathlib import Path

DEADLY = [(os, name) for name in ("fsync", "replace", "mkdir", "unlink", "rmdir")]

def prepare(subject, folder):
    pass

{program}

def deadly(function):
    def call(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call

subject, root = map(Path, sys.argv[1:])
status, fatal = signal.SIGKILL, 0
while status == signal.SIGKILL:
    fatal += 1
    folder = root / f"{{fatal:03d}}"
    prepare(subject, folder)
    child = os.fork()
    if child == 0:
        left = fatal
        for home, name in DEADLY:
            setattr(home, name, deadly(getattr(home, name)))
        act(subject, folder)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
sys.exit(status)
"""


@pytest.fixture
def killed_at_every_step(tmp_path: Path) -> Callable[[str, Path], list[Path]]:
    """`killed_at_every_step(program, subject)`: the folder that each kill of a program left."""

    def run(program: str, subject: Path) -> list[Path]:
        root = tmp_path / "killed"
        root.mkdir()
        command = [sys.executable, "-c", KILLS.format(program=program), subject, root]
        subprocess.run(command, check=True)
        return sorted(root.iterdir())

    return run


@pytest.fixture
def edge_split(edge_set: Path) -> Split:
    """Split train of `edge_set`: 28 utterances of 1 to 700 frames."""
    return open_shards(edge_set)["train"]


@pytest.fixture
def damaged_split(
    edge_sets: dict[tuple[str, str], Path], tmp_path: Path
) -> Callable[..., tuple[Split, list[int]]]:
    """`damaged_split(indices, codec)`: split train of a copy, a bit flipped in each of these."""

    def make(indices: Sequence[int], codec: str = "none") -> tuple[Split, list[int]]:
        folder = Path(shutil.copytree(edge_sets["float16", codec], tmp_path / "damaged_split"))
        split = open_shards(folder)["train"]
        for index in indices:
            row = split.locations[index]
            with open(folder / f"train-{row['shard']:06d}.tar", "r+b") as file:
                file.seek(int(row["offset"]) + int(row["nbytes"]) // 2)
                (byte,) = file.read(1)
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte ^ 4]))
        return split, list(indices)

    return make


@pytest.fixture
def write_tar() -> Callable[..., Path]:
    """`write_tar(path, members)`: a tar of (name, content) as webdataset's writer makes them.

    An array is written by numpy.save. A float as modification time takes a PAX header a member.
    """

    def write(path: Path, members: Sequence[tuple[str, object]], mtime: float = 1.5) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
            for name, content in members:
                info = tarfile.TarInfo(name)
                data = content
                if isinstance(content, np.ndarray):
                    buffer = io.BytesIO()
                    np.save(buffer, content, allow_pickle=True)
                    data = buffer.getvalue()
                elif not isinstance(content, bytes):
                    data = json.dumps(content).encode()
                assert isinstance(data, bytes)
                info.size, info.mtime, info.uname, info.mode = len(data), mtime, "bigdata", 0o444
                tar.addfile(info, io.BytesIO(data))
        return path

    return write


@pytest.fixture
def source_of(tmp_path: Path) -> Callable[..., Path]:
    """`source_of(lengths by speaker, test lengths) -> Path` of a fresh data set."""

    def make(lengths: dict[str, Sequence[int]], test: Sequence[int] = ()) -> Path:
        return write_source(tmp_path / "Dataset", lengths, test)

    return make


@pytest.fixture
def build() -> Callable[..., BuildReport]:
    """`build(source, destination, **options) -> BuildReport`, in this process by default."""

    def run(source: Path, destination: Path, **options: object) -> BuildReport:
        chosen = BuildOptions(**{"workers": 1, **options})  # type: ignore[arg-type]
        return build_shards(source, destination, chosen)

    return run


@pytest.fixture
def contents() -> Callable[[Path], dict[str, str]]:
    """`contents(folder)`: every file in it, hidden ones too, with its sha256.

    But not source-times.npy, which differs between copies of a data set.
    """

    def read(folder: Path) -> dict[str, str]:
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != "source-times.npy"
        }

    return read


@pytest.fixture
def failing_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`failing_disk(name, places)`: reads of files of a name fail at these bytes with EIO.

    As a disk does, a read that begins before such a byte ends there; `times` limits the failures,
    and `code` is another error.
    """

    def install(
        name: str, places: Container[int], *, times: int = 1 << 30, code: int = errno.EIO
    ) -> None:
        original, left = local._readinto, times

        def readinto(file: io.FileIO, buffer: Any) -> Any:
            nonlocal left
            if not str(file.name).endswith(name) or not left:
                return original(file, buffer)
            begin, view = file.tell(), memoryview(buffer).cast("B")
            bad = next((at for at in range(begin, begin + len(view)) if at in places), None)
            if bad == begin:
                left -= 1
                raise OSError(code, os.strerror(code), str(file.name))
            return original(file, view if bad is None else view[: bad - begin])

        monkeypatch.setattr(local, "_readinto", readinto)

    return install
