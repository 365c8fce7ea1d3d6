"""A build on a Ray cluster gives the bytes of a local build, even if nodes are lost."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shardprep import BuildError, BuildOptions, BuildReport, SourceError
from shardprep.build.plan import shard_tasks
from shardprep.build.pools import ray as pool_ray
from shardprep.build.pools.ray import RayPool
from shardprep.build.work_folder import FolderWork
from shardprep.format.manifest import WORK_FOLDER
from shardprep.source.dataset import scan_dataset
from tests.conftest import wait_until

pytestmark = pytest.mark.remote
ray = pytest.importorskip("ray")

Build = Callable[..., BuildReport]
Contents = Callable[[Path], dict[str, str]]

STORE = {"num_cpus": 1, "object_store_memory": 80 << 20}
# So that the loss of a node is noticed in seconds.
WATCHFUL = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 3,
}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A cluster with only its head node."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={**STORE, "include_dashboard": False, "_system_config": WATCHFUL},
    )
    yield cluster
    cluster.shutdown()


@pytest.fixture
def cluster(nodes: Any) -> Any:
    """A cluster of three nodes, one CPU each."""
    while len(nodes.worker_nodes) < 2:
        nodes.add_node(**STORE)
    nodes.wait_for_nodes()
    return nodes


@pytest.fixture
def source(make_dataset: Callable[..., Path]) -> Path:
    return make_dataset(speakers=3, utterances=8, test_utterances=5)


def ignore(samples: int, nbytes: int) -> None:
    pass


def test_build_on_three_nodes_equals_the_local_build(
    source: Path,
    tmp_path: Path,
    cluster: Any,
    build: Build,
    contents: Contents,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Each node has a working folder of its own.
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)
    there = build(
        Path(source.name),
        Path("there"),
        samples_per_shard=3,
        engine="ray",
        address=cluster.address,
        workers=0,
    )
    here = build(source, tmp_path / "here", samples_per_shard=3)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    assert there.splits == here.splits
    assert (there.utterances_read, there.source_bytes) == (here.utterances_read, here.source_bytes)
    assert not ray.is_initialized()
    assert signal.getsignal(signal.SIGTERM) is handler


def test_task_of_a_lost_node_runs_again_and_does_no_harm(
    source: Path, tmp_path: Path, cluster: Any, build: Build, contents: Contents
) -> None:
    options = BuildOptions(samples_per_shard=3)
    tasks = shard_tasks(scan_dataset(source), options)
    work = tmp_path / "shards" / WORK_FOLDER
    work.mkdir(parents=True)
    head, held, runs = cluster.head_node.node_id, tmp_path / "held", tmp_path / "runs"

    def write(task: Any, advance: Callable[[int], None]) -> Any:
        with open(runs, "a") as log:
            log.write(f"{task.plan.file}\n")

        def hold(nbytes: int) -> None:
            # One task, on another node than the head, stops in the middle of its shard.
            if (node := ray.get_runtime_context().get_node_id()) != head:
                with contextlib.suppress(FileExistsError), open(held, "x") as file:
                    file.write(f"{node} {task.plan.file}")
                    file.flush()
                    time.sleep(600)
            advance(nbytes)

        return FolderWork(work)(task, hold)

    def kill() -> None:
        wait_until(lambda: held.exists() and held.read_text() != "")
        node = held.read_text().split()[0]
        (lost,) = [n for n in cluster.worker_nodes if n.node_id == node]
        cluster.remove_node(lost, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    seen: list[tuple[int, int]] = []
    report = lambda *done: seen.append(done)  # noqa: E731
    records = list(RayPool(0, cluster.address, source, work).run(write, tasks, report))
    killer.join()

    victim = held.read_text().split()[1]
    files = sorted(task.plan.file for task in tasks)
    assert sorted(record.info.file for record in records) == files
    assert sorted(runs.read_text().split()) == sorted([*files, victim])
    assert sum(samples for samples, _ in seen) == 29
    # The part of the shard that the lost node has left.
    assert list(work.glob(f"{victim}.*.tmp"))
    assert build(source, tmp_path / "shards", samples_per_shard=3).shards_kept == len(files)
    build(source, tmp_path / "here", samples_per_shard=3)
    assert contents(tmp_path / "shards") == contents(tmp_path / "here")


def test_new_node_is_used_and_tasks_wait_here_until_there_is_room(
    nodes: Any, tmp_path: Path
) -> None:
    for node in list(nodes.worker_nodes):
        nodes.remove_node(node)
    # Wait until the cluster knows that they are gone.
    nodes.wait_for_nodes()
    head, elsewhere = nodes.head_node.node_id, tmp_path / "elsewhere"
    sent: list[int] = []

    class Task:
        def __init__(self, number: int) -> None:
            self.number = number

        def __reduce__(self) -> tuple[Any, ...]:
            sent.append(self.number)
            return int, (self.number,)

    def work(number: int, advance: Callable[[int], None]) -> int:
        if ray.get_runtime_context().get_node_id() != head:
            elsewhere.touch()
        while number and not elsewhere.exists():
            time.sleep(0.02)
        return number

    results = RayPool(0, nodes.address).run(work, [Task(n) for n in range(20)], ignore)
    found = [next(results)]
    assert len(sent) <= 2
    nodes.add_node(**STORE)
    for number in results:
        found.append(number)
        assert len(sent) - len(found) <= 2 * 2
    assert sorted(found) == sorted(sent) == list(range(20))


def test_faulty_utterance_is_the_error_of_a_local_build_and_stops_the_others(
    source: Path, tmp_path: Path, cluster: Any, build: Build
) -> None:
    bad = sorted(source.glob("*.pt"))[4]
    bad.write_bytes(b"garbage" * 99)
    with pytest.raises(SourceError) as here:
        build(source, tmp_path / "here", samples_per_shard=3)
    with pytest.raises(SourceError) as there:
        build(
            source, tmp_path / "there", samples_per_shard=3, engine="ray", address=cluster.address
        )
    assert type(there.value) is SourceError
    assert vars(there.value) == vars(here.value)
    assert there.value.exit_code == 3
    work = tmp_path / "there" / WORK_FOLDER
    assert not list(work.glob("*.tmp"))
    for path in work.glob("*.tar"):
        assert (work / f"{path.name}.json").exists()


class Asked(BaseException):
    pass


@pytest.mark.parametrize("how", ["error", "SIGTERM"])
def test_stopping_a_build_cancels_its_running_tasks(tmp_path: Path, cluster: Any, how: str) -> None:
    began = tmp_path / "began"

    def work(number: int, advance: Callable[[int], None]) -> None:
        while number:
            if began.exists():
                raise BuildError("enough")
        try:
            began.touch()
            while True:
                time.sleep(0.05)
        finally:
            (tmp_path / "ended").touch()

    def terminate(number: int, frame: Any) -> None:
        raise Asked

    def ask() -> None:
        wait_until(began.exists)
        os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.signal(signal.SIGTERM, terminate)
    asking = threading.Thread(target=ask)
    try:
        if how == "SIGTERM":
            asking.start()
        tasks = [0, 1] if how == "error" else [0]
        with pytest.raises(BuildError if how == "error" else Asked):
            list(RayPool(0, cluster.address).run(work, tasks, ignore))
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert (tmp_path / "ended").exists()


def test_folders_that_a_node_does_not_share_are_named_with_the_node(
    tmp_path: Path, cluster: Any
) -> None:
    shards, other = tmp_path / "shards", tmp_path / "other"
    shards.mkdir()
    results = RayPool(0, cluster.address, tmp_path / "absent").run(int, [1], ignore)
    with pytest.raises(BuildError, match=rf"absent: .* node {platform.node()}\..*URLs") as caught:
        list(results)
    assert caught.value.exit_code == 5
    # A different folder of the same name.
    with pool_ray._on_shared(lambda task, advance: task, tmp_path, shards) as work:
        assert work(1, ignore) == 1  # type: ignore[arg-type]
        shards.rename(other)
        shards.mkdir()
        with pytest.raises(BuildError, match=f"{shards}: .* node"):
            work(1, ignore)  # type: ignore[arg-type]
        shards.rmdir()
        other.rename(shards)
    assert list(shards.iterdir()) == []


def test_node_that_cannot_load_a_task_or_loses_its_process_is_a_build_error(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(number: int, advance: Callable[[int], None]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(pool_ray, "_RETRIES", 0)
        with pytest.raises(BuildError, match=r"gave up a task.*Run the same command again"):
            list(RayPool(0, cluster.address).run(die, [1], ignore))

    # Only this process has this module.
    module = types.ModuleType("only_here")
    exec("def work(task, advance): pass", module.__dict__)
    monkeypatch.setitem(sys.modules, "only_here", module)
    with pytest.raises(BuildError, match=r"cannot load the tasks.*only_here.*Install"):
        list(RayPool(0, cluster.address).run(module.work, [1], ignore))
    monkeypatch.setattr(pool_ray._run_one, "__module__", "only_here")
    monkeypatch.setattr(module, "_run_one", pool_ray._run_one, raising=False)
    with pytest.raises(BuildError, match=r"cannot load the tasks.*only_here.*Install"):
        list(RayPool(0, cluster.address).run(int, [1], ignore))


def test_another_error_in_a_task_is_raised_unchanged(cluster: Any) -> None:
    def work(number: int, advance: Callable[[int], None]) -> float:
        return 1 / number

    with pytest.raises(ZeroDivisionError):
        list(RayPool(0, cluster.address).run(work, [0], ignore))


def test_connection_of_the_caller_is_used_and_stays_open(cluster: Any) -> None:
    def work(number: int, advance: Callable[[int], None]) -> str:
        advance(number)
        return str(ray.get_runtime_context().gcs_address)

    ray.init(cluster.address, log_to_driver=False, logging_level="error")
    seen: list[tuple[int, int]] = []
    try:
        found = list(RayPool(1).run(work, [5, 6, 7], lambda *done: seen.append(done)))
        assert ray.is_initialized()
    finally:
        ray.shutdown()
    assert found == [cluster.address] * 3
    # In order, because only one task runs at a time.
    assert seen == [(1, 5), (1, 6), (1, 7)]


def test_cluster_without_a_cpu_is_waited_for_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = {"CPU": 3.0}
    fake = types.SimpleNamespace(cluster_resources=lambda: found)
    assert [pool_ray._Capacity(fake, workers)() for workers in (0, 1, 9)] == [6, 1, 6]
    capacity = pool_ray._Capacity(fake, 0)
    found.clear()
    assert capacity() == 1
    monkeypatch.setattr(pool_ray, "_NO_CPU_SECONDS", 0)
    with pytest.raises(BuildError, match="no node of the Ray cluster has a CPU"):
        capacity()


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "auto"])
def test_unreachable_cluster_is_a_build_error_at_once(
    source: Path,
    tmp_path: Path,
    run_cli: Callable[..., subprocess.CompletedProcess[str]],
    monkeypatch: pytest.MonkeyPatch,
    address: str,
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    address = address.format(port)
    done = run_cli("build", source, tmp_path / "shards", "--engine=ray", f"--address={address}")
    assert done.returncode == 5
    assert f"address {address}: cannot connect to a Ray cluster" in done.stderr
    assert "ray start --head" in done.stderr


def test_without_ray_the_error_names_the_extra(
    source: Path, tmp_path: Path, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BuildError, match=r"pip install 'shardprep\[ray\]'"):
        build(source, tmp_path / "shards", engine="ray")


def test_address_goes_with_ray(
    source: Path, tmp_path: Path, run_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = run_cli("build", source, tmp_path / "shards", "--address=auto")
    assert done.returncode == 2
    assert "--address goes with --engine ray" in done.stderr


# Gets a SIGTERM when the first shard is there.
TERMINATED = """
import os, signal
from shardprep.cli import main
from shardprep.cli.progress import BuildProgress

BuildProgress.advance = lambda *arguments: os.kill(os.getpid(), signal.SIGTERM)
main()
"""


def test_terminated_build_continues_on_another_cluster(
    source: Path, tmp_path: Path, cluster: Any, build: Build, contents: Contents
) -> None:
    shards = tmp_path / "shards"
    command = [sys.executable, "-c", TERMINATED, "build", source, shards]
    command += ["--samples-per-shard=3", "--engine=ray", f"--address={cluster.address}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (143, "")
    assert done.stderr.split("\n")[-2:] == [
        "terminated; run the same command again to continue",
        "",
    ]
    assert not list(shards.glob(f"{WORK_FOLDER}/*.tmp"))
    kept = len(list(shards.glob(f"{WORK_FOLDER}/*.tar")))
    report = build(source, shards, samples_per_shard=3, engine="ray", workers=2)
    assert 0 < report.shards_kept == kept < sum(s.shards for s in report.splits.values())
    build(source, tmp_path / "here", samples_per_shard=3)
    assert contents(shards) == contents(tmp_path / "here")
