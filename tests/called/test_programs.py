"""Called from other people's programs: a thread, a pool, an event loop, a script of a few lines."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

import shardprep
from tests.called.conftest import OPTIONS, Run, digests

# No `if __name__ == "__main__":`, as beginners write.
SCRIPT = f"""
import sys, shardprep
print("once")
report = shardprep.build_shards(sys.argv[1], sys.argv[2], {OPTIONS})
assert report.utterances_read == 29
"""


@pytest.mark.parametrize("how", ["file", "-c", "stdin"])
def test_a_script_without_a_guard_builds_once(
    python: Run, source: Path, shards: Path, tmp_path: Path, how: str
) -> None:
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    words = {"file": [file], "-c": ["-c", SCRIPT], "stdin": ["-"]}[how]
    done = python(*words, source, tmp_path / "built", input=SCRIPT if how == "stdin" else None)
    assert (done.returncode, done.stdout, done.stderr) == (0, "once\n", "")
    assert digests(tmp_path / "built") == digests(shards)


POOL = f"""
import multiprocessing, sys, shardprep
from concurrent.futures import ProcessPoolExecutor

def work(folder):
    shardprep.build_shards(sys.argv[1], folder, {OPTIONS})
    assert shardprep.verify_shards(folder, deep=True).intact
    return len(shardprep.open_shards(folder)["train"])

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[3])
    folders = [sys.argv[2] + "/1", sys.argv[2] + "/2"]
    # Its processes are daemonic: they may start none by multiprocessing.
    with context.Pool(2) as pool:
        print(pool.map(work, folders))
    with ProcessPoolExecutor(1, context) as pool:
        print(pool.submit(work, sys.argv[2] + "/3").result())
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_worker_of_a_pool_builds_and_reads(
    python: Run, source: Path, shards: Path, tmp_path: Path, method: str
) -> None:
    (tmp_path / "pool.py").write_text(POOL)
    done = python(tmp_path / "pool.py", source, tmp_path / "built", method)
    assert (done.returncode, done.stderr) == (0, "")
    for number in "123":
        assert digests(tmp_path / "built" / number) == digests(shards)


def test_a_build_needs_no_shared_memory_and_no_semaphores(
    python: Run, source: Path, shards: Path, tmp_path: Path
) -> None:
    hide = "import multiprocessing, sys; sys.modules['multiprocessing.heap'] = None\n"
    hide += "sys.modules['multiprocessing.synchronize'] = None\n"
    done = python("-c", hide + SCRIPT, source, tmp_path / "built")
    assert (done.returncode, done.stderr) == (0, "")
    assert digests(tmp_path / "built") == digests(shards)


def in_thread(work: Callable[[], object]) -> object:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def in_event_loop(work: Callable[[], object]) -> object:
    async def main() -> object:
        return work()

    return asyncio.run(main())


@pytest.mark.parametrize("call", [in_thread, in_event_loop])
def test_a_thread_and_an_event_loop_build_read_and_repair(
    call: Callable[[Callable[[], object]], object], source: Path, shards: Path, tmp_path: Path
) -> None:
    built = tmp_path / "built"

    def work() -> int:
        options = shardprep.BuildOptions(samples_per_shard=4, workers=2)
        shardprep.build_shards(source, built, options)
        assert shardprep.verify_shards(built, deep=True).intact
        (built / "split=val.index.npy").unlink()
        assert shardprep.repair_shards(built, workers=2).intact
        train = shardprep.open_shards(built)["train"]
        batches = list(shardprep.SegmentLoader(train, batch_size=4, segment_frames=16))
        streamed = sum(1 for _ in shardprep.stream(built))
        assert streamed == len(train)
        return len(batches)

    assert call(work) == 5
    assert digests(built) == digests(shards)


def test_a_program_reads_on_after_it_went_to_another_folder(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [shardprep.open_shards(shards)["train"].read(index) for index in range(8)]
    monkeypatch.chdir(shards.parent)
    train = shardprep.open_shards("shards")["train"]
    pipeline = shardprep.stream("shards", "train")
    monkeypatch.chdir(tmp_path)
    found = [train.read(index) for index in range(8)]
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    again = pickle.loads(pickle.dumps(train))
    assert np.array_equal(again.read(0), expected[0])
    assert sum(1 for _ in pipeline) == len(train)


def test_a_cache_stays_where_it_was_when_the_program_goes_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cache = shardprep.ShardCache("cache")
    assert cache.folder.path == tmp_path / "cache"


def test_a_forked_process_and_a_pickled_set_read_the_same(shards: Path) -> None:
    shard_set = shardprep.open_shards(shards)
    train = shard_set["train"]
    expected = train.read(3)
    # Another thread may map a shard just when the process is forked.
    with train._map._lock:  # type: ignore[attr-defined]
        if not (child := os.fork()):
            code = 1
            try:
                code = int(not all(np.isfinite(train.read(i)).all() for i in range(len(train))))
            finally:
                os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    again = pickle.loads(pickle.dumps(shard_set))
    assert np.array_equal(again["train"].read(3), expected)
    assert again.splits == shard_set.splits


class Named:
    """A path of somebody's own kind."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __fspath__(self) -> str:
        return str(self._path)


class Text(str):
    """As configuration libraries have them."""

    __slots__ = ()


@pytest.mark.parametrize("kind", [str, Text, Named])
def test_paths_may_be_of_any_kind(
    kind: Callable[[Path], os.PathLike[str]], source: Path, shards: Path, tmp_path: Path
) -> None:
    built = tmp_path / "built"
    options = shardprep.BuildOptions(samples_per_shard=4, workers=1)
    shardprep.build_shards(kind(source), kind(built), options)
    assert shardprep.verify_shards(kind(built), against=kind(source)).intact
    assert shardprep.repair_shards(kind(built)).intact
    assert len(shardprep.open_shards(kind(built))["train"]) == 21
    assert sum(1 for _ in shardprep.stream(kind(built), "val")) == 3
    assert digests(built) == digests(shards)


def test_numbers_may_be_numpy_s(source: Path, tmp_path: Path) -> None:
    one, two = (
        shardprep.BuildOptions(
            codec="zstd",
            level=kind(5),
            samples_per_shard=kind(4),
            seed=kind(3),
            workers=kind(2),
            val_fraction=fraction(0.25),
        )
        for kind, fraction in ((int, float), (np.int64, np.float64))
    )
    for name, options in {"int": one, "numpy": two}.items():
        shardprep.build_shards(source, tmp_path / name, options)
    assert digests(tmp_path / "int") == digests(tmp_path / "numpy")


@pytest.mark.parametrize("order", ["global", "windowed"])
def test_numbers_of_a_loader_may_be_numpy_s(
    shards: Path, order: Literal["global", "windowed"]
) -> None:
    train = shardprep.open_shards(shards)["train"]

    def loader(kind: Callable[[int], int]) -> shardprep.SegmentLoader:
        made = shardprep.SegmentLoader(
            train,
            batch_size=kind(4),
            segment_frames=kind(16),
            seed=kind(3),
            rank=kind(1),
            world_size=kind(2),
            order=order,
            lanes=kind(2),
            window_shards=kind(2),
            prefetch=kind(1),
        )
        made.set_epoch(kind(2))
        return made

    one, two = loader(int), loader(np.int64)
    for ours, theirs in zip(one, two, strict=True):
        assert all(ours[name].equal(theirs[name]) for name in ours)
    assert json.dumps(two.state_dict()) == json.dumps(one.state_dict())
    for kind in (int, np.int64):
        evaluated = shardprep.UtteranceLoader(train, max_frames=kind(700), prefetch=kind(2))
        assert sum(len(batch["mel"]) for batch in evaluated) == len(train)


def test_threads_that_publish_at_once_leave_the_umask_alone(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        barrier = threading.Barrier(4)

        def write(number: int) -> None:
            barrier.wait()
            for round in range(50):
                with shardprep.publish(tmp_path / f"{number}-{round}") as file:
                    file.write(b"x")

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(write, range(4)))
        assert os.umask(0o027) == 0o027
        assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}
    finally:
        os.umask(before)
