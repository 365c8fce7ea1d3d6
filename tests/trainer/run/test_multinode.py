"""Several launchers, as on several machines: the same run as on one, and none is indispensable."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.distributed import TCPStore

import shardprep
from shardprep_trainer.config.fields import Config
from shardprep_trainer.train import main
from tests.conftest import PATIENCE, wait_until

ConfigFactory = Callable[..., Config]
SCRIPT = Path(__file__).resolve().parents[3] / "trainer" / "train.py"
RECORDER = Path(__file__).with_name("recording_train.py")
# No part of the network may depend on how many segments a process sees.
OPTIONS = {
    "data.global_batch": 8,
    "train.sync_batchnorm": True,
    "model.dropout": 0,
    "train.log_steps": 1,
    "train.valid_steps": 0,
}


@pytest.fixture(autouse=True)
def machines_of_one_host(monkeypatch: pytest.MonkeyPatch) -> None:
    # Those that join later find the others at the address of their own round only.
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")


class Machine:
    """A launcher and its processes, in a session of their own; what they say is in a file."""

    def __init__(self, words: list[str], said: Path) -> None:
        self.said = said
        with said.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *words],
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def ends_well(self) -> None:
        """Wait for the launcher, which must end with code 0."""
        assert self.process.wait(PATIENCE) == 0, self.said.read_text()

    def kill(self) -> None:
        """End everything at once, the launcher last, as a power cut would."""
        self._kill_workers()
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()

    def _kill_workers(self) -> None:
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                if int(stat.read_text().rpartition(")")[2].split()[1]) == self.process.pid:
                    os.kill(int(stat.parent.name), signal.SIGKILL)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Machine]]:
    """`start(*words) -> Machine`; none is left behind."""
    machines: list[Machine] = []

    def begin(*words: str) -> Machine:
        machines.append(Machine(list(words), tmp_path / f"machine{len(machines)}.txt"))
        return machines[-1]

    yield begin
    for machine in machines:
        machine.kill()


def meeting_store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def torchrun(port: int, address: str, *options: str) -> list[str]:
    """The words that start the agent of a machine."""
    timing = "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=6"
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    # None of the machines holds the store by which they meet, so that each may go.
    meeting.append(f"--rdzv-conf=is_host=false,{timing}")
    return ["torch.distributed.run", *meeting, f"--local-addr={address}", *options]


def accelerate(port: int, number: int) -> list[str]:
    machine = [f"--machine_rank={number}", f"--main_process_port={port}"]
    meeting = ["--num_machines=2", "--num_processes=2", "--main_process_ip=127.0.0.1", *machine]
    return ["accelerate.commands.launch", "--cpu", *meeting]


def write(config: Config, folder: Path) -> list[str]:
    path = folder / f"{config.name}.yaml"
    path.write_text(config.to_yaml())
    return ["--config", str(path)]


def losses(config: Config) -> dict[int, float]:
    lines = (config.run / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row["loss"] for row in map(json.loads, lines)}


@pytest.mark.slow
@pytest.mark.remote
def test_two_machines_learn_what_one_does_and_one_process_with_twice_the_batch(
    make_config: ConfigFactory, start: Callable[..., Machine], tmp_path: Path
) -> None:
    def config(name: str) -> Config:
        return make_config(name=name, **OPTIONS, **{"train.total_steps": 30})

    fixed = ["--nnodes=2", "--nproc-per-node=1"]
    store, port = meeting_store(), free_port()
    launches = {
        "torchrun": [torchrun(store.port, f"127.0.0.{n}", *fixed) for n in (1, 2)],
        "accelerate": [accelerate(port, n) for n in (0, 1)],
        "one": [["torch.distributed.run", "--standalone", "--nproc-per-node=2"]],
    }
    assert main(write(config("single"), tmp_path)) == 0
    expected = losses(config("single"))
    assert list(expected) == list(range(1, 31))
    for name, machines in launches.items():
        options = write(config(name), tmp_path)
        for machine in [start(*words, str(SCRIPT), *options) for words in machines]:
            machine.ends_well()
        assert losses(config(name)) == pytest.approx(expected, abs=1e-4), name


@pytest.mark.slow
@pytest.mark.remote
def test_a_machine_that_dies_and_one_that_joins_cost_no_utterance_and_change_no_step(
    make_dataset: Callable[..., Path],
    make_config: ConfigFactory,
    start: Callable[..., Machine],
    tmp_path: Path,
) -> None:
    # A segment contains a complete utterance, so that its digest identifies the utterance.
    source = make_dataset("Short", speakers=3, utterances=10, frames=(20, 60))
    build = shardprep.BuildOptions(val_fraction=0.2, workers=1)
    shardprep.build_shards(source, tmp_path / "short", build)
    options = {**OPTIONS, "data.shards": tmp_path / "short", "optim.lr": 3e-4}
    options |= {"train.total_steps": 120, "train.save_steps": 7}
    config, whole = make_config(name="parts", **options), make_config(name="whole", **options)
    assert main(write(whole, tmp_path)) == 0

    record = tmp_path / "record"
    record.mkdir()
    store, words = meeting_store(), [str(RECORDER), str(record), *write(config, tmp_path)]

    def machine(address: str) -> Machine:
        elastic = ["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3"]
        return start(*torchrun(store.port, address, *elastic), *words)

    # The one that stays is first by its address at one time, and second at another.
    stays, dies = machine("127.0.0.2"), machine("127.0.0.3")
    wait_for(lambda: last_of(record)[0] == 2 and last_of(record)[1] >= 10, stays)
    dies.kill()
    wait_for(lambda: last_of(record)[0] == 1, stays)
    joins = machine("127.0.0.1")
    stays.ends_well()
    joins.ends_well()

    starts, history = effective(record)
    assert [world for _, world in starts][-1] == 2
    assert {world for _, world in starts} == {1, 2}
    # Where the loader stands after each step: after the third of an epoch, where the next begins.
    assert list(history) == [(step // 3, step % 3 * 8) for step in range(1, 121)]
    every = Counter(digests(shardprep.open_shards(config.data.shards)["train"]))
    assert len(every) == 24
    for epoch in range(40):
        places = ((epoch, 8), (epoch, 16), (epoch + 1, 0))
        segments = [segment for place in places for segment in history[place]]
        assert Counter(segments) == every
    assert losses(config) == pytest.approx(losses(whole), abs=1e-4)


def wait_for(condition: Callable[[], bool], machine: Machine) -> None:
    """Wait until something is so, as long as a launcher runs."""
    try:
        wait_until(condition, machine.process)
    except AssertionError:
        raise AssertionError(machine.said.read_text()) from None


def rows_of(record: Path) -> list[dict[str, Any]]:
    """What the processes noted, the earlier starts first."""
    rows = []
    for path in record.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            # A kill may leave a part of a line.
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return sorted(rows, key=lambda row: row["began"])


def last_of(record: Path) -> tuple[int, int]:
    """World size and batches of the newest start, 0 and 0 before the first."""
    rows = rows_of(record)
    newest = [row for row in rows if row["start"] == rows[-1]["start"]]
    return (newest[-1]["world_size"], len(newest)) if rows else (0, 0)


def effective(
    record: Path,
) -> tuple[list[tuple[str, int]], dict[tuple[int, int], list[str]]]:
    """The starts with their world sizes, and what each step of the run was trained on in the end.

    A start continues from a checkpoint: what an earlier one did beyond it is done again, and counts
    no more.
    """
    starts: dict[str, int] = {}
    found: dict[tuple[int, int], dict[str, list[list[str]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for row in rows_of(record):
        starts[row["start"]] = row["world_size"]
        found[row["epoch"], row["position"]][row["start"]].append(row["segments"])
    history, order = {}, list(starts)
    for at, by_start in sorted(found.items()):
        last = max(by_start, key=order.index)
        # Every process of that start took its part.
        assert len(by_start[last]) == starts[last]
        history[at] = [segment for segments in by_start[last] for segment in segments]
    return list(starts.items()), history


def digests(split: shardprep.Split) -> Iterator[str]:
    """A digest that identifies each utterance as a segment: read completely, padded by hand."""
    for index in range(len(split)):
        mel = split.read(index)
        segment = np.full((64, mel.shape[1]), -20, mel.dtype)
        segment[: len(mel)] = mel
        yield hashlib.md5(segment.tobytes()).hexdigest()
