"""Fixtures for all tests: small data sets in the homework's layout, made from a seed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from shardprep.cli import main

N_MELS = 40
# Seconds to wait for anything: no machine is that slow, and the time limit of a test is longer.
PATIENCE = 500.0
DatasetFactory = Callable[..., Path]

# No test may depend on how busy the machine is.
settings.register_profile("shardprep", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shardprep")

# A shell starts background programs with Ctrl-C ignored, and children inherit that: programs that
# tests stop with Ctrl-C would continue.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def write_dataset(
    root: Path,
    *,
    speakers: int = 3,
    utterances: int = 8,
    test_utterances: int = 5,
    frames: tuple[int, int] = (20, 200),
    seed: int = 0,
) -> Path:
    """Write metadata.json, mapping.json, testdata.json and the `.pt` files they name.

    Each speaker has a mean spectrum of its own, so that a model can tell them apart; the frames
    around it are smooth in time. The truth about the test utterances goes into
    `root/../test_labels.csv`.
    """
    rng = np.random.default_rng(seed)
    root.mkdir(parents=True)
    names = [f"id{n:05d}" for n in range(speakers)]
    voices = rng.normal(-4.0, 3.0, (speakers, N_MELS))

    def utterance(speaker: int, number: str) -> dict[str, object]:
        length = int(rng.integers(frames[0], frames[1] + 1))
        noise = rng.normal(0.0, 1.0, (length, N_MELS)).cumsum(0) / np.sqrt(length)
        name = f"uttr-{hashlib.md5(number.encode()).hexdigest()}.pt"
        mel = (voices[speaker] + noise).astype(np.float32)
        torch.save(torch.from_numpy(mel), root / name)
        return {"feature_path": name, "mel_len": length}

    metadata = {
        name: [utterance(s, f"{seed}/{s}/{u}") for u in range(utterances)]
        for s, name in enumerate(names)
    }
    truth = [int(s) for s in rng.integers(0, speakers, test_utterances)]
    test = [utterance(s, f"{seed}/test/{u}") for u, s in enumerate(truth)]
    mapping = {
        "speaker2id": {name: s for s, name in enumerate(names)},
        "id2speaker": {str(s): name for s, name in enumerate(names)},
    }
    (root / "metadata.json").write_text(json.dumps({"n_mels": N_MELS, "speakers": metadata}))
    (root / "mapping.json").write_text(json.dumps(mapping))
    if test_utterances:
        (root / "testdata.json").write_text(json.dumps({"n_mels": N_MELS, "utterances": test}))
        rows = [f"{row['feature_path']},{names[s]}" for row, s in zip(test, truth, strict=True)]
        (root.parent / "test_labels.csv").write_text("\n".join(["Id,Category", *rows]) + "\n")
    return root


@pytest.fixture
def make_dataset(tmp_path: Path) -> DatasetFactory:
    """`make_dataset(**options) -> Path` of a fresh data set; see `write_dataset` for options."""

    def make(name: str = "Dataset", **options: object) -> Path:
        return write_dataset(tmp_path / name, **options)  # type: ignore[arg-type]

    return make


@pytest.fixture
def run_cli(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_cli("verify", folder)`: the command line, run in this process."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        words = [str(argument) for argument in arguments]
        monkeypatch.setattr(sys, "argv", ["shardprep", *words])
        handler = signal.getsignal(signal.SIGTERM)
        capsys.readouterr()
        try:
            with pytest.raises(SystemExit) as stop:
                main()
        finally:
            signal.signal(signal.SIGTERM, handler)
        said = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return subprocess.CompletedProcess(words, stop.value.code, said.out, said.err)

    return run


def wait_until(
    condition: Callable[[], object], process: subprocess.Popen[Any] | None = None
) -> None:
    """Wait for what another thread or process does, however long a busy machine takes for it.

    The end of `process` ends a wait in vain, and so does PATIENCE.
    """
    end = time.monotonic() + PATIENCE
    while not condition():
        assert process is None or process.poll() is None or condition(), "the process has ended"
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


@contextlib.contextmanager
def mounted(place: Path, size: str) -> Iterator[Path]:
    """A file system of a size such as "256k", in a new folder; skips if the system refuses."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may not mount a file system")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def stored_bytes(cache: Path) -> int:
    """Bytes of all files of a cache together, while other processes may change it."""
    total = 0
    for path in cache.iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size if path.name != "lock" else 0
    return total
