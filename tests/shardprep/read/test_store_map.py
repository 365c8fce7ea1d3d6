"""Shards come and go: what is read is always right, and what is wanted is there."""

from __future__ import annotations

import gc
import hashlib
import random
import resource
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from shardprep import CorruptShardError, StorageError
from shardprep.cache.shard_cache import ShardCache
from shardprep.format.manifest import ShardInfo
from shardprep.read.shard_map import WantedShards
from shardprep.read.store_map import StoreMap
from shardprep.storage import connections
from shardprep.storage.remote import Remote
from tests.conftest import PATIENCE, stored_bytes, wait_until

SIZE = 5000


def content(number: int) -> bytes:
    return random.Random(number).randbytes(SIZE)


class Store:
    """A folder in memory of files train-000000.tar, ... of SIZE bytes.

    Attributes:
        asked: Numbers of the files that were asked for.
        before: Called with the number before it is answered.
    """

    def __init__(self) -> None:
        self.files = fsspec.filesystem("memory")
        self.asked: list[int] = []
        self.before: Callable[[int], None] = lambda number: None

    def shards(self, count: int) -> list[ShardInfo]:
        infos = []
        for number in range(count):
            name, data = f"train-{number:06d}.tar", content(number)
            self.files.pipe(f"/set/{name}", data)
            infos.append(ShardInfo(name, 1, 1, SIZE, hashlib.sha256(data).hexdigest()))
        return infos


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    store = Store()
    read = MemoryFileSystem.cat_file

    def cat_file(self: Any, path: str, *arguments: Any, **options: Any) -> Any:
        store.asked.append(number := int(path[-10:-4]))
        store.before(number)
        return read(self, path, *arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    yield store
    store.files.store.clear()
    connections.forget_connections()


@pytest.fixture
def mapped(store: Store, tmp_path: Path) -> Callable[..., StoreMap]:
    """`mapped(count, room)`: a map of so many files, with a cache that has room for `room`."""

    def make(count: int, room: float, **options: Any) -> StoreMap:
        cache = ShardCache(tmp_path / "cache", int(room * SIZE), **{"readers": 1, **options})
        return StoreMap(
            [(Remote("memory://set", 2.0), info) for info in store.shards(count)], cache
        )

    return make


def another(shards: StoreMap) -> StoreMap:
    """A second map of the same files, by the same cache."""
    return StoreMap([(Remote("memory://set"), info) for info in shards._infos], shards._cache)


def read(shards: StoreMap, *numbers: int) -> list[bytes]:
    """The mapped bytes of some files while they are being read."""
    with shards.reading(np.array(numbers)):
        begins = shards.begins.tolist()
        return [bytes(shards.bytes[begins[n] : begins[n] + SIZE]) for n in numbers]


def there(shards: StoreMap) -> list[int]:
    return np.flatnonzero(shards._space.mapped).tolist()


def test_files_are_mapped_as_they_are_read(mapped: Callable[..., StoreMap], store: Store) -> None:
    shards = mapped(20, 20)
    assert read(shards, 3, 7, 3) == [content(3), content(7), content(3)]
    assert sorted(store.asked) == [3, 7]
    assert read(shards, 3) == [content(3)]
    assert sorted(store.asked) == [3, 7]
    # Between two files, and where no file is mapped, there are zeros.
    assert not shards.bytes[SIZE : int(shards.begins[1])].any()


def test_wanted_files_come_in_order_and_leave_when_wanted_no_longer(
    mapped: Callable[..., StoreMap], store: Store
) -> None:
    shards = mapped(20, 10)
    wanted = WantedShards(shards)
    wanted.want([5, 2], [9, 1])
    wait_until(lambda: there(shards) == [1, 2, 5, 9])
    assert set(store.asked[:2]) <= {5, 2, 9, 1}
    wanted.want([1, 3])
    wait_until(lambda: there(shards) == [1, 3])
    assert sorted(store.asked) == [1, 2, 3, 5, 9]
    wanted.close()
    assert there(shards) == []


def test_a_reader_wants_as_many_of_the_later_files_as_there_is_room_for(
    mapped: Callable[..., StoreMap], store: Store
) -> None:
    shards = mapped(30, 8)
    WantedShards(shards).want([0, 1], range(2, 30))
    wanted = WantedShards(shards)
    wanted.want([0, 1], range(2, 30))
    # Three quarters of the share of a process.
    wait_until(lambda: there(shards) == [0, 1, 2, 3, 4, 5])
    time.sleep(0.05)
    assert len(there(shards)) == 6


def test_a_file_comes_that_is_wanted_while_an_older_order_of_it_is_dropped(
    mapped: Callable[..., StoreMap],
) -> None:
    shards = mapped(10, 10)
    looked = threading.Event()

    class Slow(Counter[int]):
        def __getitem__(self, key: int) -> int:
            value = super().__getitem__(key)
            if threading.current_thread() is dropping:
                looked.set()
                time.sleep(0.2)
            return value

    # The order of a reader that is gone finds that nobody wants the file, while another reader
    # begins to want it.
    shards._wanted, shards._coming[3] = Slow(), Future()
    dropping = threading.Thread(target=shards._fetch_ahead, args=(3, True))
    dropping.start()
    assert looked.wait(PATIENCE)
    wanted = WantedShards(shards)
    wanted.want([3])
    dropping.join()
    wait_until(lambda: there(shards) == [3])


def test_a_file_that_came_and_left_comes_again_when_it_is_wanted(
    mapped: Callable[..., StoreMap], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = mapped(10, 10)
    trim, other_wants = shards._trim, threading.Event()

    def late(most: int, keep: set[int]) -> None:
        assert other_wants.wait(10)
        trim(most, keep)

    monkeypatch.setattr(shards, "_trim", late)
    one, other = WantedShards(shards), WantedShards(shards)
    one.want([3])
    wait_until(lambda: there(shards) == [3])
    # The thread that fetched it has not ended yet.
    one.close()
    assert there(shards) == []
    other.want([3])
    other_wants.set()
    wait_until(lambda: there(shards) == [3])


def test_a_file_that_two_readers_want_stays_until_neither_wants_it(
    mapped: Callable[..., StoreMap],
) -> None:
    shards = mapped(10, 10)
    one, other = WantedShards(shards), WantedShards(shards)
    one.want([1, 2])
    other.want([2, 3])
    wait_until(lambda: there(shards) == [1, 2, 3])
    one.close()
    assert there(shards) == [2, 3]
    other.close()
    assert there(shards) == []


def test_a_reader_that_is_dropped_wants_nothing(mapped: Callable[..., StoreMap]) -> None:
    shards = mapped(10, 10)
    wanted = WantedShards(shards)
    wanted.want([1, 2])
    wait_until(lambda: there(shards) == [1, 2])
    del wanted
    gc.collect()
    assert there(shards) == []


def test_a_file_that_is_being_read_stays_when_it_is_wanted_no_longer(
    mapped: Callable[..., StoreMap],
) -> None:
    shards = mapped(10, 10)
    wanted = WantedShards(shards)
    wanted.want([1, 2])
    with shards.reading(np.array([1])):
        wait_until(lambda: there(shards) == [1, 2])
        wanted.close()
        # Each file separately: a read keeps only the files that it reads.
        assert there(shards) == [1]
        assert bytes(shards.bytes[shards.begins[1] :][:SIZE]) == content(1)
    assert there(shards) == []


def test_only_few_files_stay_mapped_that_nobody_wants(mapped: Callable[..., StoreMap]) -> None:
    shards = mapped(30, 20)
    for number in range(30):
        assert read(shards, number) == [content(number)]
    # A fifth of the cache, and the file that was read last.
    assert there(shards) == [25, 26, 27, 28, 29]


def test_files_that_nobody_wants_are_given_up_when_room_is_short(
    mapped: Callable[..., StoreMap], store: Store
) -> None:
    shards = mapped(10, 5)
    assert read(shards, 0, 1, 2, 3, 4) == [content(n) for n in range(5)]
    other = another(shards)
    assert read(other, 5, 6, 7, 8, 9) == [content(n) for n in range(5, 10)]


def test_a_reader_takes_the_room_of_wanted_files_rather_than_wait(
    mapped: Callable[..., StoreMap],
) -> None:
    shards = mapped(20, 8)
    ahead = WantedShards(shards)
    ahead.want([0, 1], range(2, 6))
    wait_until(lambda: len(there(shards)) == 6)
    other = another(shards)
    assert read(other, 10, 11, 12, 13, 14) == [content(n) for n in range(10, 15)]
    assert len(there(shards)) == 3
    assert read(shards, 4) == [content(4)]


def test_more_than_the_cache_keeps_cannot_be_read_at_once(
    mapped: Callable[..., StoreMap], store: Store
) -> None:
    shards = mapped(10, 4)
    with pytest.raises(StorageError, match=r"25000 bytes .*at once.*20000.*SHARDPREP_CACHE_GB"):
        read(shards, 0, 1, 2, 3, 4)
    assert store.asked == []
    assert read(shards, 0, 1, 2, 3) == [content(n) for n in range(4)]


def test_files_that_others_never_give_back_are_an_error_in_the_end(
    mapped: Callable[..., StoreMap],
) -> None:
    shards = mapped(10, 4, patience=0.3)
    other = another(shards)
    with other.reading(np.array([0, 1, 2])):
        with pytest.raises(StorageError, match="there was no room"):
            read(shards, 5, 6)
        assert read(shards, 7) == [content(7)]
    assert read(shards, 5, 6) == [content(5), content(6)]


def test_values_are_right_while_shards_come_and_go(
    mapped: Callable[..., StoreMap], tmp_path: Path
) -> None:
    shards = mapped(16, 9)
    expected = [content(n) for n in range(16)]
    wrong: list[object] = []
    end = time.monotonic() + 2.0

    def reader(seed: int) -> None:
        draw = random.Random(seed)
        try:
            while time.monotonic() < end:
                numbers = draw.sample(range(16), 2)
                if read(shards, *numbers) != [expected[n] for n in numbers]:
                    wrong.append(numbers)
        except BaseException as error:
            wrong.append(error)

    def mover(seed: int) -> None:
        draw = random.Random(seed)
        try:
            while time.monotonic() < end:
                wanted = WantedShards(shards)
                for _ in range(draw.randrange(4)):
                    wanted.want(draw.sample(range(16), 2), draw.sample(range(16), 4))
                    time.sleep(0.001)
                if draw.random() < 0.5:
                    wanted.close()
        except BaseException as error:
            wrong.append(error)

    def watcher() -> None:
        while time.monotonic() < end:
            total = stored_bytes(tmp_path / "cache")
            if total > 9 * SIZE:
                wrong.append(total)

    jobs = [threading.Thread(target=reader, args=(n,)) for n in range(3)]
    jobs += [threading.Thread(target=mover, args=(n,)) for n in range(2)]
    jobs += [threading.Thread(target=watcher)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert wrong == []
    gc.collect()
    wait_until(lambda: not shards._coming)
    assert +shards._wanted == +shards._reads == {}
    assert shards._leaving == set()


def test_errors_of_fetching_ahead_reach_the_reader(
    mapped: Callable[..., StoreMap], store: Store
) -> None:
    shards = mapped(10, 10)
    asked = threading.Event()

    def before(number: int) -> None:
        if number == 3:
            asked.wait(10)
            raise PermissionError("not yours")

    store.before = before
    wanted = WantedShards(shards)
    wanted.want([3, 4])
    threading.Timer(0.1, asked.set).start()
    with pytest.raises(StorageError, match="not yours"):
        read(shards, 3)
    assert read(shards, 4) == [content(4)]
    # The error is not remembered.
    store.before = lambda number: None
    assert read(shards, 3) == [content(3)]


def test_a_missing_file_is_an_error_when_it_is_read_and_not_before(
    mapped: Callable[..., StoreMap], store: Store
) -> None:
    shards = mapped(10, 10)
    store.files.rm("/set/train-000003.tar")
    shards.check_sizes()
    shards.map_all()
    wanted = WantedShards(shards)
    wanted.want([3, 4])
    wait_until(lambda: there(shards) == [4] and not shards._coming)
    with pytest.raises(CorruptShardError, match=r"memory://set/train-000003.tar: is missing"):
        read(shards, 3)


def test_a_file_that_is_needed_now_does_not_wait_behind_later_ones(
    mapped: Callable[..., StoreMap], store: Store
) -> None:
    shards = mapped(40, 60)
    free = threading.Event()
    store.before = lambda number: None if number == 39 else [free.wait(PATIENCE), None][1]
    wanted = WantedShards(shards)
    wanted.want(range(30))
    wait_until(lambda: len(store.asked) == 8)
    assert read(shards, 39) == [content(39)]
    # A file whose order has not begun is fetched by the thread that needs it.
    wanted.want(range(8, 40))
    store.before = lambda number: None if number == 20 else [free.wait(PATIENCE), None][1]
    assert read(shards, 20) == [content(20)]
    free.set()


def test_time_spent_waiting_is_counted(mapped: Callable[..., StoreMap], store: Store) -> None:
    shards = mapped(10, 10)
    store.before = lambda number: time.sleep(0.1)
    read(shards, 1)
    assert shards._cache.traffic.waited >= 0.1
    before = shards._cache.traffic.waited
    read(shards, 1)
    assert shards._cache.traffic.waited == before


def test_mapped_files_take_no_descriptors(
    mapped: Callable[..., StoreMap],
) -> None:
    shards = mapped(100, 100)
    wanted = WantedShards(shards)
    read(shards, 0)
    before = len(list(Path("/proc/self/fd").iterdir()))
    wanted.want(range(70))
    wait_until(lambda: len(there(shards)) == 70)
    wait_until(lambda: len(list(Path("/proc/self/fd").iterdir())) <= before)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft > before
    for number in range(5):
        wanted.want(range(10 * number, 10 * number + 20))
        read(shards, 90 + number)
    wait_until(lambda: not shards._coming)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


def test_mapped_files_stay_in_the_cache_and_others_do_not(
    mapped: Callable[..., StoreMap], tmp_path: Path
) -> None:
    shards = mapped(10, 4)
    names = [info.sha256 for info in shards._infos]
    with shards.reading(np.array([0, 1])):
        other = ShardCache(tmp_path / "cache", 4 * SIZE, readers=1)
        for number in range(2, 10):
            info = shards._infos[number]
            other.hold(Remote("memory://set") / info.file, info).close()
            left = {path.name for path in (tmp_path / "cache").iterdir()}
            assert {names[0], names[1], names[number]} <= left
    shards.give_back(urgent=False)
    for number in range(2, 6):
        info = shards._infos[number]
        other.hold(Remote("memory://set") / info.file, info).close()
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"lock", *names[2:6]}


# Reads in a process that was forked while files came, and then gives them back.
FORKS = """
import hashlib, os, random, signal, sys, time
import fsspec, numpy as np
from shardprep.cache.shard_cache import ShardCache
from shardprep.read.shard_map import WantedShards
from shardprep.read.store_map import StoreMap
from shardprep.format.manifest import ShardInfo
from shardprep.storage.remote import Remote

signal.alarm(500)
files, infos = fsspec.filesystem("memory"), []
for number in range(12):
    data = random.Random(number).randbytes(5000)
    name = f"train-{number:06d}.tar"
    files.pipe(f"/set/{name}", data)
    infos.append(ShardInfo(name, 1, 1, 5000, hashlib.sha256(data).hexdigest()))
cat, parent = type(files).cat_file, os.getpid()

def slow(self, path, *arguments, **options):
    if os.getpid() == parent and "000005" in path:
        time.sleep(1)
    return cat(self, path, *arguments, **options)

type(files).cat_file = slow
cache = ShardCache(sys.argv[1], 4 * 5000, readers=1, patience=400)
shards = StoreMap([(Remote("memory://set"), info) for info in infos], cache)

def right(number):
    with shards.reading(np.array([number])):
        begin = int(shards.begins[number])
        return bytes(shards.bytes[begin:begin + 5000]) == random.Random(number).randbytes(5000)

wanted = WantedShards(shards)
wanted.want([4, 5])
assert right(4)
down, up = os.pipe()
child = os.fork()
if not child:
    signal.alarm(500)
    good = right(4) and right(5) and right(6)
    shards.give_back(urgent=False)
    wanted.close()
    os.write(up, b"y" if good else b"n")
    time.sleep(600)
print(os.read(down, 1))
wanted.close()
shards.give_back(urgent=False)
# The child is alive, and holds no room that its parent has given back.
with shards.reading(np.array([8, 9, 10, 11])):
    print(right(8))
os.kill(child, 9)
"""


def test_a_forked_process_reads_by_itself(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FORKS, str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split() == ["b'y'", "True"], done.stderr
