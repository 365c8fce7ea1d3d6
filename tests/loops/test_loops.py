"""In other people's training loops, every utterance comes once an epoch, and resuming is exact."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch

from shardprep import BuildOptions, build_shards, open_shards
from tests.loops.recorded import Segment, loader, read, segments
from tests.shardprep.conftest import write_source

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
EPOCHS = 3
# Seconds that a program may take, ten times what it takes on a busy machine.
PATIENCE = 250.0
STOOD_STILL = -1

pytestmark = pytest.mark.loops


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 utterances to train on; frame t of utterance i holds (i, t, 0, ...)."""
    folder = tmp_path_factory.mktemp("loops")
    source = write_source(folder / "Dataset", dict.fromkeys("abcd", (30,) * 10), ())
    for number, path in enumerate(sorted(source.glob("*.pt"))):
        mel = torch.zeros(30, 7)
        mel[:, 0] = number
        mel[:, 1] = torch.arange(30)
        torch.save(mel, path)
    build_shards(source, folder / "shards", BuildOptions(val_fraction=0, workers=1))
    return folder / "shards"


def expected(shards: Path, ranks: int) -> list[list[Segment]]:
    """Every batch of all ranks, of all epochs, as loaders with given ranks read them."""
    loaders = [loader(shards, rank=rank, world_size=ranks) for rank in range(ranks)]
    found = []
    for _ in range(EPOCHS):
        for batches in zip(*loaders, strict=True):
            found.append(sum((segments(batch) for batch in batches), []))
    return found


def run(script: str, shards: Path, out: Path, *acts: str, ranks: int | None = None) -> None:
    """Run a loop's script; with `ranks`, by torchrun.

    These programs fork while they have threads, which Python warns of: a worker may begin with a
    lock that nobody will ever release. A program that stands still is started once more.
    """
    launcher = [sys.executable]
    if ranks is not None:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*launcher, str(HERE / script), str(shards), str(out), *acts]
    code, said = ended(command, out)
    if code == STOOD_STILL:
        print(f"stood still:\n{said}")
        for file in out.iterdir():
            shutil.rmtree(file) if file.is_dir() else file.unlink()
        code, said = ended(command, out)
    assert code == 0, said


def ended(command: list[str], out: Path) -> tuple[int, str]:
    """Run a program; its exit code, or STOOD_STILL, and its output."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    own = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    log = out.with_suffix(".log")
    with log.open("w") as output:
        program = subprocess.Popen(command, env={**os.environ, **own}, stdout=output, stderr=output)
        try:
            return program.wait(PATIENCE), log.read_text()
        except subprocess.TimeoutExpired:
            # Each process then says where its threads stand.
            whole = psutil.Process(program.pid)
            for process in (*whole.children(recursive=True), whole):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGABRT)
            program.wait()
            return STOOD_STILL, log.read_text()


def check_epochs(found: list[list[Segment]], shards: Path) -> None:
    """Every utterance once an epoch, in orders that differ."""
    size = len(found) // EPOCHS
    count = len(open_shards(shards)["train"])
    parts = [found[epoch * size : (epoch + 1) * size] for epoch in range(EPOCHS)]
    for part in parts:
        assert Counter(n for batch in part for n, _ in batch) == Counter(range(count))
    assert parts[0] != parts[1] != parts[2]


@pytest.mark.parametrize("ranks", [1, 2])
def test_lightning(shards: Path, tmp_path: Path, ranks: int) -> None:
    run("lightning_loop.py", shards, tmp_path, str(ranks))
    whole = read(tmp_path, str(ranks), ranks)
    check_epochs(whole, shards)
    assert whole == expected(shards, ranks)
    run("lightning_loop.py", shards, tmp_path, f"resume{ranks}")
    half = len(whole) // EPOCHS * 3 // 2
    assert read(tmp_path, f"resume{ranks}", ranks) == whole[half:]


def test_lightning_with_workers(shards: Path, tmp_path: Path) -> None:
    run("lightning_loop.py", shards, tmp_path, "workers", "stateful", "resume-stateful")
    assert read(tmp_path, "workers", 1) == expected(shards, 1)
    whole = read(tmp_path, "stateful", 1)
    assert whole == expected(shards, 1)
    assert read(tmp_path, "resume-stateful", 1) == whole[len(whole) // EPOCHS * 3 // 2 :]


@pytest.mark.parametrize("ranks", [1, 2])
def test_hugging_face_trainer(shards: Path, tmp_path: Path, ranks: int) -> None:
    run("trainer_loop.py", shards, tmp_path, "whole", "resume", ranks=ranks)
    whole = read(tmp_path, "whole", ranks)
    check_epochs(whole, shards)
    assert whole == expected(shards, ranks)
    half = len(whole) // EPOCHS * 3 // 2
    assert read(tmp_path, "resume", ranks) == whole[half:]


@pytest.mark.parametrize("ranks", [1, 2])
def test_map_style_data_set_in_the_hugging_face_trainer(
    shards: Path, tmp_path: Path, ranks: int
) -> None:
    run("map_loop.py", shards, tmp_path, "trainer", ranks=ranks)
    check_epochs(read(tmp_path, "trainer", ranks), shards)


def test_map_style_data_set_in_a_lightning_data_module(shards: Path, tmp_path: Path) -> None:
    run("map_loop.py", shards, tmp_path, "lightning")
    check_epochs(read(tmp_path, "lightning", 1), shards)


@pytest.mark.parametrize("ranks", [1, 2])
def test_torchrun_and_accelerator_prepare(shards: Path, tmp_path: Path, ranks: int) -> None:
    run("plain_loop.py", shards, tmp_path, "plain", "prepare", ranks=ranks)
    for act in ("plain", "prepare"):
        found = read(tmp_path, act, ranks)
        check_epochs(found, shards)
        assert found == expected(shards, ranks)


def test_what_accelerate_would_divide_twice_is_refused(shards: Path, tmp_path: Path) -> None:
    for act in ("dispatch", "shard"):
        run("plain_loop.py", shards, tmp_path, act, ranks=2)
        for rank in range(2):
            said = (tmp_path / f"{act}.{rank}.jsonl").read_text()
            assert "1 of every 2 utterances would be lost" in said


def test_accelerate_may_prepare_a_dataloader_for_one_process(shards: Path, tmp_path: Path) -> None:
    run("plain_loop.py", shards, tmp_path, "dispatch")
    assert read(tmp_path, "dispatch", 1) == expected(shards, 1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_torchdata(shards: Path, tmp_path: Path, ranks: int) -> None:
    run("stateful_loop.py", shards, tmp_path, "all", ranks=ranks)
    names = {path.name.split(".")[0] for path in tmp_path.glob("*.jsonl")}
    assert len(names) == 10
    for name in names:
        assert read(tmp_path, name, ranks) == expected(shards, ranks), name
