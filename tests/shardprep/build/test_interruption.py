"""A build that is interrupted at any moment continues to the same bytes."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from scripts.torture import injuries
from shardprep import (
    BuildOptions,
    BuildReport,
    StorageError,
    build_shards,
    open_shards,
    verify_shards,
)
from shardprep.format.manifest import WORK_FOLDER
from shardprep.storage.local import sha256_of
from tests.conftest import mounted, wait_until

Build = Callable[..., BuildReport]
Contents = Callable[[Path], dict[str, str]]

BUILD = """
import torch
from shardprep import BuildOptions, build_shards
from shardprep.format import codecs

torch.set_num_threads(1)
DEADLY.append((codecs, "encode"))

def act(source, folder):
    options = BuildOptions(workers=1, samples_per_shard=3, on_error="skip")
    build_shards(source, folder, options)
"""


def tars_of(folder: Path) -> list[Path]:
    """Shards under their final names: in the work folder, or in their places."""
    return [*folder.glob("*.tar"), *folder.glob(f"{WORK_FOLDER}/*.tar")]


def assert_final_names_are_complete(folder: Path) -> int:
    """Check every shard under its final name, in an unfinished or finished set; count them."""
    found = 0
    for path in tars_of(folder):
        # Both end-of-archive blocks are there, and only padding follows.
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            assert members
            assert tar.offset + 1024 <= path.stat().st_size
        record_path = folder / WORK_FOLDER / f"{path.name}.json"
        if record_path.exists():
            record = json.loads(record_path.read_text())
            sha = hashlib.sha256(path.read_bytes()).hexdigest()
            assert record["info"]["sha256"] == sha
        else:
            assert (folder / "manifest.json").exists()
        found += 1
    if (folder / "manifest.json").exists():
        for split in open_shards(folder).values():
            for index in range(len(split)):
                split.read(index)
    names = {path.name for path in folder.iterdir()} - {WORK_FOLDER}
    assert not [name for name in names if name.endswith(".tmp")]
    return found


# Slow on purpose: at this level a shard takes tens of milliseconds.
OPTIONS = {"codec": "zstd", "level": 22, "samples_per_shard": 4, "workers": 2}
WORDS = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]

SIGNALS = {
    "kill": (signal.SIGKILL, False, -signal.SIGKILL),
    "kill the group": (signal.SIGKILL, True, -signal.SIGKILL),
    "terminate": (signal.SIGTERM, False, 143),
    "Ctrl-C": (signal.SIGINT, True, 130),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Long utterances, so that a build takes some seconds."""
    root = tmp_path_factory.mktemp("slow") / "Dataset"
    root.mkdir()
    rng = np.random.default_rng(0)
    entries = []
    for n in range(200):
        mel = rng.normal(0, 1, (1500, 40)).cumsum(0).astype(np.float32)
        torch.save(torch.from_numpy(mel / 40), root / f"u{n}.pt")
        entries.append(f'{{"feature_path": "u{n}.pt", "mel_len": 1500}}')
    listed = ", ".join(entries)
    (root / "metadata.json").write_text(f'{{"n_mels": 40, "speakers": {{"ann": [{listed}]}}}}')
    return root


# Builds, but waits in its own process, the parent of the workers, once there is a new shard: a busy
# machine may be late to stop it.
WAITING = """
import sys
from pathlib import Path
from shardprep.cli import main
from shardprep.cli.progress import BuildProgress

def shards():
    return len([*Path(sys.argv[3]).glob("**/*.tar")])

def wait(*arguments):
    if shards() > before:
        sys.stdin.read()

before, BuildProgress.advance = shards(), wait
main()
"""


@pytest.fixture
def interrupted(source: Path, tmp_path: Path) -> Callable[[str], str]:
    """`interrupted(how) -> stderr`: start or continue the build; stop it after some shards."""
    shards = tmp_path / "shards"

    def run(how: str) -> str:
        number, whole_group, expected = SIGNALS[how]
        before = set(tars_of(shards))
        command = [sys.executable, "-c", WAITING, "build", source, shards, *WORDS]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stderr=pipe, start_new_session=True) as build:
            wait_until(lambda: set(tars_of(shards)) - before, build)
            time.sleep(random.uniform(0, 0.15))
            (os.killpg if whole_group else os.kill)(build.pid, number)
            assert build.stderr is not None
            said = build.stderr.read().decode()
        assert build.returncode == expected, said
        wait_until(lambda: not injuries.group(build.pid))
        assert not (shards / "manifest.json").exists()
        return said

    return run


@pytest.mark.parametrize(
    "hows",
    [("kill", "kill the group", "kill"), ("terminate", "Ctrl-C")],
    ids=["killed", "asked to stop"],
)
def test_stopped_build_continues_to_the_same_bytes(
    source: Path,
    tmp_path: Path,
    reference: dict[str, str],
    interrupted: Callable[[str], str],
    build: Build,
    contents: Contents,
    hows: tuple[str, ...],
) -> None:
    shards = tmp_path / "shards"
    for how in hows:
        said = interrupted(how)
        if how in ("terminate", "Ctrl-C"):
            assert "run the same command again to continue" in said
            assert "Traceback" not in said
        final = {path.name: sha256_of(path) for path in tars_of(shards)}
        assert final.items() <= reference.items()
    kept = len(tars_of(shards))
    report = build(source, shards, **OPTIONS)
    assert len(hows) <= report.shards_kept == kept < 50
    assert contents(shards) == reference


@pytest.fixture(scope="module")
def reference(source: Path) -> dict[str, str]:
    """The sha256 of each file of the set, from an undisturbed build."""
    shards = source.parent / "reference"
    build_shards(source, shards, BuildOptions(**OPTIONS))  # type: ignore[arg-type]
    assert verify_shards(shards).intact
    files = open_shards(shards).manifest.files()
    return {name: sha256_of(shards / name) for name in (*files, "README.md", "manifest.json")}


@pytest.fixture
def small_source(make_dataset: Callable[..., Path]) -> Path:
    root = make_dataset(speakers=2, utterances=4, test_utterances=2)
    sorted(root.glob("*.pt"))[0].write_bytes(b"garbage")
    return root


SMALL = {"samples_per_shard": 3, "on_error": "skip"}


def test_build_killed_at_any_step_continues_to_the_same_bytes(
    small_source: Path,
    tmp_path: Path,
    build: Build,
    contents: Contents,
    killed_at_every_step: Callable[[str, Path], list[Path]],
) -> None:
    folders = killed_at_every_step(BUILD, small_source)
    build(small_source, tmp_path / "fresh", **SMALL)
    expected = contents(tmp_path / "fresh")
    assert "rejects.jsonl" in expected
    shards_found = [assert_final_names_are_complete(folder) for folder in folders]
    assert len(folders) > 40
    assert set(shards_found) == set(range(5))
    kept = [build(small_source, folder, **SMALL).shards_kept for folder in folders]
    assert max(kept) == 4
    for folder in folders:
        assert contents(folder) == expected, folder


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=["full", "failing"])
def test_failing_disk_at_any_step_is_a_storage_error_and_the_build_continues(
    small_source: Path,
    tmp_path: Path,
    build: Build,
    contents: Contents,
    number: int,
) -> None:
    build(small_source, tmp_path / "fresh", **SMALL)
    refused = 0
    for step in itertools.count(1):
        shards = tmp_path / str(step)
        # Files with small buffers, so that a shard takes many writes.
        with injuries.refusing(step, number, 4096):
            fault = storage_fault(build, small_source, shards)
        if fault is not None:
            assert f"{os.strerror(number)}. " in fault
            refused += 1
            if shards.exists():
                assert_final_names_are_complete(shards)
        build(small_source, shards, **SMALL)
        assert contents(shards) == contents(tmp_path / "fresh")
        if fault is None and step > refused + 10:
            # This step is after the end of the build. Before it, only clean-up may fail unnoticed.
            break
    assert refused > 60


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    with mounted(tmp_path / "disk", "256k") as place:
        yield place


def test_build_on_a_full_disk_continues_when_there_is_room(
    small_source: Path,
    small_disk: Path,
    tmp_path: Path,
    contents: Contents,
) -> None:
    (small_disk / "ballast").write_bytes(bytes(180_000))
    shards = small_disk / "shards"
    options = ["--samples-per-shard=3", "--on-error=skip", "--workers=2"]
    command = [sys.executable, "-m", "shardprep", "build", small_source, shards, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 6
    assert "No space left on device. The disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (shards / "manifest.json").exists()
    (small_disk / "ballast").unlink()
    # On a read-only disk, nothing changes.
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 6
    assert "Read-only file system" in done.stderr
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    assert subprocess.run(command, capture_output=True).returncode == 0
    build_shards(small_source, tmp_path / "fresh", BuildOptions(workers=1, **SMALL))  # type: ignore[arg-type]
    assert contents(shards) == contents(tmp_path / "fresh")


def storage_fault(build: Build, source: Path, shards: Path) -> str | None:
    try:
        build(source, shards, **SMALL)
    except StorageError as error:
        return str(error)
    return None
