"""Tasks give the same results in worker processes; deaths and errors of workers are reported."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from shardprep import BuildError, SourceError
from shardprep.build.plan import ShardPlan, ShardTask, plan_shards
from shardprep.build.pools.local import LocalPool
from shardprep.build.shard import Advance, ShardRecord
from shardprep.build.work_folder import FolderWork
from shardprep.format.manifest import CodecInfo
from shardprep.source.dataset import scan_dataset


@pytest.fixture
def tasks(make_dataset: Callable[..., Path], tmp_path: Path) -> list[ShardTask]:
    source = scan_dataset(make_dataset(speakers=3, utterances=8, test_utterances=0))
    plans = plan_shards(source, val_fraction=0, samples_per_shard=3, seed=0)["train"]
    return [
        ShardTask(plan, source.reader, 40, "float16", CodecInfo("none"), skip=False)
        for plan in plans
    ]


@pytest.fixture
def work(tmp_path: Path) -> FolderWork:
    (tmp_path / "shards" / ".shardprep-build").mkdir(parents=True)
    return FolderWork(tmp_path / "shards" / ".shardprep-build")


def workers_of_this_process() -> list[str]:
    """Command lines of the processes that a pool of this process has started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        # A process may end just now.
        with contextlib.suppress(OSError):
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            command = (folder / "cmdline").read_text()
            if int(parent) == os.getpid() and "pools" in command:
                found.append(command)
    return found


def ignore(samples: int, nbytes: int) -> None:
    pass


@pytest.mark.parametrize("workers", [1, 2])
def test_every_task_gives_its_result_and_its_progress(
    tasks: list[ShardTask], work: FolderWork, workers: int
) -> None:
    seen: list[tuple[int, int]] = []
    results = list(LocalPool(workers).run(work, tasks, lambda *done: seen.append(done)))
    assert {r.info.file for r in results} == {t.plan.file for t in tasks}
    assert sum(samples for samples, _ in seen) == 24
    assert sum(nbytes for _, nbytes in seen) == sum(r.source_bytes for r in results)


def test_worker_starts_with_pytorch_limited_to_one_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert list(LocalPool(2).run(os.getenv, ["OMP_NUM_THREADS"] * 3, ignore)) == ["1"] * 3


def test_without_tasks_nothing_is_done(work: FolderWork) -> None:
    assert list(LocalPool(2).run(work, [], ignore)) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_error_of_a_task_arrives_with_all_its_fields(
    tasks: list[ShardTask], work: FolderWork, workers: int
) -> None:
    bad = tasks[5].plan.utterances[1]
    (tasks[5].reader.root / bad.path).write_bytes(b"garbage")
    with pytest.raises(SourceError) as caught:
        list(LocalPool(workers).run(work, tasks, ignore))
    assert caught.value.file == str(tasks[5].reader.root / bad.path)
    assert caught.value.key == f"speaker {bad.speaker}"
    assert caught.value.remedy
    assert workers_of_this_process() == []


def test_error_of_a_task_stops_the_others_at_their_next_utterance(
    tasks: list[ShardTask], work: FolderWork
) -> None:
    bad, good = tasks[0], tasks[1].plan
    (bad.reader.root / bad.plan.utterances[0].path).write_bytes(b"garbage")
    # Seconds of work, so that the other worker is busy when the fault is found.
    endless = ShardPlan(good.file, good.split, good.utterances * 30_000)
    with pytest.raises(SourceError):
        list(LocalPool(2).run(work, [dataclasses.replace(bad, plan=endless), bad], ignore))
    assert not (work.folder.parent / good.file).exists()
    assert list(work.folder.glob("*.tmp")) == []


def test_closing_early_leaves_no_process_and_no_partial_file(
    tasks: list[ShardTask], work: FolderWork
) -> None:
    results = LocalPool(2).run(work, tasks, ignore)
    first: ShardRecord = next(results)
    results.close()
    assert workers_of_this_process() == []
    for path in work.folder.glob("*.tar"):
        assert (work.folder / f"{path.name}.json").exists()
    assert (work.folder / first.info.file).stat().st_size == first.info.bytes
    assert list(work.folder.glob("*.tmp")) == []


def kill_this_worker(number: int, advance: Advance) -> int:
    """A task of which number 3 ends its process."""
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_killed_worker_is_a_build_error_with_a_remedy() -> None:
    expected = r"worker process died \(SIGKILL\).* Run the same command again"
    with pytest.raises(BuildError, match=expected):
        list(LocalPool(2).run(kill_this_worker, range(9), ignore))
    assert workers_of_this_process() == []


class Odd(Exception):
    """An error that cannot be unpickled."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def raise_odd(number: int, advance: Advance) -> int:
    raise Odd(number, 2) if number else ValueError("plain")


@pytest.mark.parametrize(("task", "kind"), [(0, ValueError), (1, RuntimeError)])
def test_a_fault_of_our_own_arrives_with_the_place_where_it_arose(
    task: int, kind: type[Exception]
) -> None:
    with pytest.raises(kind) as caught:
        list(LocalPool(2).run(raise_odd, [task, task], ignore))
    told = [str(caught.value), *getattr(caught.value, "__notes__", [])]
    assert any("in raise_odd" in text for text in told)


def test_work_runs_in_this_process_when_there_is_one_task(tasks: list[ShardTask]) -> None:
    pids = list(LocalPool(8).run(lambda task, advance: os.getpid(), tasks[:1], ignore))
    assert pids == [os.getpid()]
    assert list(LocalPool(8).run(lambda task, advance: io.BytesIO(), [], ignore)) == []


def test_workers_have_the_current_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["SHARDPREP_TEST_ONE", "SHARDPREP_TEST_TWO"]
    for name in names:
        monkeypatch.setenv(name, "before")
    assert list(LocalPool(2).run(os.getenv, names, lambda *done: None)) == ["before", "before"]
    monkeypatch.setenv(names[0], "now")
    monkeypatch.setenv(names[1], "now")
    assert list(LocalPool(2).run(os.getenv, names, lambda *done: None)) == ["now", "now"]
