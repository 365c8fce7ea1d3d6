"""The cache: each file is fetched once, complete or not at all, and never more than the budget."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shardprep import CorruptShardError, StorageError
from shardprep.cache import download, ledger
from shardprep.cache import folder as cachefolder
from shardprep.cache.folder import NoRoomError
from shardprep.cache.shard_cache import ShardCache
from shardprep.format.manifest import FileInfo
from shardprep.storage.remote import Remote
from tests.conftest import PATIENCE, mounted, stored_bytes

KB = 1000


class Store:
    """Replaces every store: its files by name, and which parts of them were requested."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, int, int]] = []
        #: Called with each answer; what it returns is sent instead.
        self.answer: Callable[[bytes], bytes] = lambda data: data

    def put(self, name: str, size: int) -> tuple[Remote, FileInfo]:
        data = random.Random(name).randbytes(size)
        self.files[name] = data
        info = FileInfo(name, size, hashlib.sha256(data).hexdigest())
        return Remote(f"fake://store/{name}"), info

    def read(self, remote: Remote, begin: int, end: int) -> bytes:
        self.asked.append((remote.name, begin, end))
        if remote.name not in self.files:
            raise FileNotFoundError(remote.name)
        return self.answer(self.files[remote.name][begin:end])


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    """What every `Remote` of the test reads from, 1 kB at a time."""
    store = Store()
    monkeypatch.setattr(Remote, "read", lambda *arguments: store.read(*arguments))
    monkeypatch.setattr(download, "CHUNK", KB)
    return store


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def stored(place: Path) -> dict[str, bytes]:
    """Every file of a cache but its lock."""
    return {path.name: path.read_bytes() for path in place.iterdir() if path.name != "lock"}


def test_a_file_is_fetched_once_and_is_what_the_store_has(store: Store, place: Path) -> None:
    shards = ShardCache(place, 10 * KB)
    remote, info = store.put("a", 2500)
    held = shards.hold(remote, info)
    assert held.path.read_bytes() == os.pread(held.handle, 9999, 0) == store.files["a"]
    assert store.asked == [("a", 0, 1000), ("a", 1000, 2000), ("a", 2000, 2500)]
    again, elsewhere = shards.hold(remote, info), ShardCache(place, 10 * KB).hold(remote, info)
    assert again.path == elsewhere.path == held.path
    assert len(store.asked) == 3
    assert (shards.traffic.files, shards.traffic.bytes) == (1, 2500)


def test_wrong_bytes_are_fetched_again_and_never_seen(store: Store, place: Path) -> None:
    seen: list[set[str]] = []

    def answer(data: bytes) -> bytes:
        seen.append({name for name in stored(place) if not name.endswith(".part")})
        return data if len(seen) != 2 else bytes([data[0] ^ 1]) + data[1:]

    store.answer = answer
    held = ShardCache(place, 10 * KB).hold(*store.put("a", 3000))
    assert held.path.read_bytes() == store.files["a"]
    assert len(seen) == 6
    assert set.union(*seen) == set()


def test_a_file_that_is_always_wrong_is_an_error_and_leaves_nothing(
    store: Store, place: Path
) -> None:
    store.answer = lambda data: bytes(len(data))
    remote, info = store.put("a", 1500)
    with pytest.raises(CorruptShardError, match=r"fake://store/a: its bytes are not those"):
        ShardCache(place, 10 * KB).hold(remote, info)
    assert stored(place) == {}


@pytest.mark.parametrize("there", [0, 700, 1000, 1700])
def test_a_file_that_is_shorter_than_it_should_be_is_damaged(
    store: Store, place: Path, there: int
) -> None:
    remote, info = store.put("a", 2500)
    store.files["a"] = store.files["a"][:there]
    with pytest.raises(CorruptShardError, match="its bytes are not those"):
        ShardCache(place, 10 * KB).hold(remote, info)
    assert stored(place) == {}


def test_a_missing_file_is_named(store: Store, place: Path) -> None:
    remote, info = store.put("a", 500)
    del store.files["a"]
    with pytest.raises(CorruptShardError, match=r"fake://store/a: is missing"):
        ShardCache(place, 10 * KB).hold(remote, info)


def test_a_server_without_ranges_is_asked_once(store: Store, place: Path) -> None:
    remote, info = store.put("a", 2500)
    store.answer = lambda data: store.files["a"]
    assert ShardCache(place, 10 * KB).hold(remote, info).path.read_bytes() == store.files["a"]
    assert len(store.asked) == 1


def test_an_interrupted_download_continues_where_it_ended(store: Store, place: Path) -> None:
    remote, info = store.put("a", 3500)

    def answer(data: bytes) -> bytes:
        if len(store.asked) == 3:
            raise StorageError("gone")
        return data

    store.answer = answer
    shards = ShardCache(place, 10 * KB)
    with pytest.raises(StorageError, match="gone"):
        shards.hold(remote, info)
    assert stored(place) == {f"{info.sha256}.3500.part": store.files["a"][:2000]}
    assert shards.hold(remote, info).path.read_bytes() == store.files["a"]
    assert store.asked[3:] == [("a", 2000, 3000), ("a", 3000, 3500)]


def test_a_part_with_wrong_bytes_is_fetched_from_the_start(store: Store, place: Path) -> None:
    remote, info = store.put("a", 2500)
    shards = ShardCache(place, 10 * KB)
    shards.folder.part(info).write_bytes(bytes(2000))
    assert shards.hold(remote, info).path.read_bytes() == store.files["a"]
    shards.folder.part(info).write_bytes(bytes(9999))
    (place / info.sha256).unlink()
    assert shards.hold(remote, info).path.read_bytes() == store.files["a"]


# A program that fetches from the same store as its test, with the bytes of each file made from its
# name. `hold(shards, name, size)` holds a file; the text of a test replaces {program}.
OTHER = """
import hashlib, os, random, sys, time
from shardprep.cache import download
from shardprep.cache.shard_cache import ShardCache
from shardprep.format.manifest import FileInfo
from shardprep.storage.remote import Remote

asked = []

def content(name, size):
    return random.Random(name).randbytes(size)

def read(remote, begin, end):
    asked.append(remote.name)
    name, size = remote.name.split("-")
    return answer(content(remote.name, int(size))[begin:end])

def answer(data):
    return data

def hold(shards, name, **options):
    size = int(name.split("-")[1])
    info = FileInfo(name, size, hashlib.sha256(content(name, size)).hexdigest())
    return shards.hold(Remote("fake://store/" + name), info, **options)

Remote.read, download.CHUNK = read, 1000
place = sys.argv[1]
{program}
"""


def other(program: str, place: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", OTHER.replace("{program}", program), str(place)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_process_that_is_killed_leaves_a_part_that_the_next_one_completes(
    store: Store, place: Path
) -> None:
    program = """
def answer(data):
    if len(asked) == 3:
        print("half", flush=True)
        time.sleep(600)
    return data
hold(ShardCache(place, 10_000), "a-3500")
"""
    with other(program, place) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "half\n"
        run.send_signal(signal.SIGKILL)
    remote, info = store.put("a-3500", 3500)
    assert stored(place) == {f"{info.sha256}.3500.part": store.files["a-3500"][:2000]}
    held = ShardCache(place, 10 * KB).hold(remote, info)
    assert hashlib.sha256(held.path.read_bytes()).hexdigest() == info.sha256 == held.path.name
    assert [begin for _, begin, _ in store.asked] == [2000, 3000]


def test_processes_that_want_the_same_file_fetch_it_once(place: Path) -> None:
    program = """
def answer(data):
    time.sleep(0.1)
    return data
held = hold(ShardCache(place, 10_000), "a-5000")
print(len(asked), os.pread(held.handle, 9999, 0) == content("a-5000", 5000))
"""
    runs = [other(program, place) for _ in range(3)]
    said = [run.communicate(timeout=PATIENCE)[0].split() for run in runs]
    assert sorted(said) == [["0", "True"], ["0", "True"], ["5", "True"]]


def test_threads_that_want_the_same_file_fetch_it_once(store: Store, place: Path) -> None:
    shards = ShardCache(place, 10 * KB)
    remote, info = store.put("a", 5000)
    store.answer = lambda data: time.sleep(0.02) or data  # type: ignore[func-returns-value]
    with ThreadPoolExecutor(6) as threads:
        held = list(threads.map(lambda _: shards.hold(remote, info), range(6)))
    assert len(store.asked) == 5
    assert all(os.pread(one.handle, 9999, 0) == store.files["a"] for one in held)


def test_the_least_recently_used_goes_first(store: Store, place: Path) -> None:
    shards = ShardCache(place, 3 * KB)
    files = {name: store.put(name, KB) for name in "abcde"}
    for name, left in (
        ("a", "a"),
        ("b", "ab"),
        ("c", "abc"),
        ("a", "bca"),
        ("d", "cad"),
        ("e", "ade"),
    ):
        shards.hold(*files[name]).close()
        # The clock of a file system takes steps of some milliseconds.
        time.sleep(0.02)
        assert set(stored(place)) == {files[other][1].sha256 for other in left}


def test_a_held_file_stays_until_it_is_closed(store: Store, place: Path) -> None:
    shards = ShardCache(place, 2 * KB)
    first, second = (shards.hold(*store.put(name, KB)) for name in "ab")
    third = store.put("c", KB)
    with pytest.raises(NoRoomError):
        shards.hold(*third, wait=False)
    assert set(stored(place)) == {first.path.name, second.path.name}
    first.close()
    shards.hold(*third, wait=False)
    assert set(stored(place)) == {second.path.name, third[1].sha256}


def test_a_wait_for_room_ends_when_a_file_is_closed(store: Store, place: Path) -> None:
    shards = ShardCache(place, KB)
    first = shards.hold(*store.put("a", KB))
    with ThreadPoolExecutor(1) as thread:
        second = thread.submit(shards.hold, *store.put("b", KB))
        time.sleep(0.2)
        assert not second.done()
        first.close()
        assert second.result().path.read_bytes() == store.files["b"]


def test_a_wait_without_room_ends_in_an_error_with_the_remedy(store: Store, place: Path) -> None:
    shards = ShardCache(place, KB, patience=0.3)
    held = shards.hold(*store.put("a", KB))
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"no room for fake://store/b .*SHARDPREP_CACHE_GB"):
        shards.hold(*store.put("b", KB))
    assert time.monotonic() - began >= 0.3
    assert set(stored(place)) == {held.path.name}


def test_a_file_of_more_than_the_budget_is_refused_at_once(store: Store, place: Path) -> None:
    with pytest.raises(StorageError, match=r"at most 1000 bytes.*1001.*SHARDPREP_CACHE_GB"):
        ShardCache(place, KB).hold(*store.put("a", KB + 1))
    assert store.asked == []
    assert stored(place) == {}


def test_parts_that_nobody_holds_make_room(store: Store, place: Path) -> None:
    shards = ShardCache(place, 2 * KB)
    left = store.put("left", 2 * KB)[1]
    shards.folder.part(left).write_bytes(b"some")
    held = shards.hold(*store.put("a", KB))
    assert set(stored(place)) == {held.path.name}


def test_a_part_that_is_being_fetched_counts_with_its_full_size(store: Store, place: Path) -> None:
    shards = ShardCache(place, 3 * KB)
    part = shards.folder.claim(store.put("coming", 2 * KB)[1])
    assert part is not None
    with pytest.raises(NoRoomError):
        shards.hold(*store.put("b", KB + 1), wait=False)
    shards.hold(*store.put("c", KB), wait=False)
    shards.folder.unclaim(part)


def test_borrowers_are_asked_to_give_back_before_a_reader_waits(store: Store, place: Path) -> None:
    class Keeper:
        def __init__(self) -> None:
            self.loose = [shards.hold(*store.put("a", KB))]
            self.wanted = [shards.hold(*store.put("b", KB))]

        in_use = 0

        def give_back(self, *, urgent: bool) -> None:
            for held in self.wanted if urgent else self.loose:
                held.close()

    shards = ShardCache(place, 2 * KB)
    keeper = Keeper()
    shards.add_borrower(keeper)
    held = shards.hold(*store.put("c", KB), wait=False)
    assert set(stored(place)) == {keeper.wanted[0].path.name, held.path.name}
    with pytest.raises(NoRoomError):
        shards.hold(*store.put("d", KB), wait=False)
    shards.hold(*store.put("d", KB))
    assert keeper.wanted[0].path.name not in stored(place)


def test_a_process_keeps_to_its_share_even_if_there_is_room(store: Store, place: Path) -> None:
    class Keeper:
        in_use = 3 * KB
        asked: list[bool] = []

        def give_back(self, *, urgent: bool) -> None:
            self.asked.append(urgent)
            if urgent:
                self.in_use -= KB

    shards = ShardCache(place, 8 * KB, readers=2)
    keeper = Keeper()
    shards.add_borrower(keeper)
    shards.hold(*store.put("a", KB), wait=False)
    assert not keeper.asked
    with pytest.raises(NoRoomError):
        shards.hold(*store.put("b", 2 * KB), wait=False)
    assert keeper.asked == [False]
    shards.hold(*store.put("b", 2 * KB))
    assert keeper.asked == [False, False, True]
    assert keeper.in_use == 2 * KB


# Holds random files in some threads, and reports whether all had the right bytes.
HAMMER = """
from concurrent.futures import ThreadPoolExecutor
shards = ShardCache(place, 12_000)

def work(seed):
    draw, good = random.Random(seed), True
    for _ in range(60):
        size = draw.choice([500, 1500, 3000])
        name = f"{draw.randrange(12)}-{size}"
        held = hold(shards, name)
        good &= os.pread(held.handle, 9999, 0) == content(name, size)
        if draw.random() < 0.3:
            time.sleep(0.002)
        held.close()
    return good

with ThreadPoolExecutor(3) as threads:
    print(all(threads.map(work, [os.getpid() * 10 + n for n in range(3)])))
"""


def test_processes_and_threads_never_exceed_the_budget(place: Path) -> None:
    runs = [other(HAMMER, place) for _ in range(3)]
    most = 0
    while any(run.poll() is None for run in runs):
        most = max(most, stored_bytes(place) if place.exists() else 0)
    assert [run.communicate()[0].split() for run in runs] == [["True"]] * 3
    # A file that is gone before its turn comes may be counted beside the one in its place.
    assert 6000 < most <= 12_000
    assert sum(len(data) for data in stored(place).values()) <= 12_000


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    with mounted(tmp_path / "disk", "1m") as place:
        yield place


def test_a_disk_that_fills_up_makes_the_cache_smaller(store: Store, small_disk: Path) -> None:
    shards = ShardCache(small_disk / "cache", 100_000 * KB)
    for name in "abcdefghij":
        held = shards.hold(*store.put(name, 200 * KB))
        assert held.path.read_bytes() == store.files[name]
        held.close()
    # Others take all that the cache leaves free.
    (small_disk / "other").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    for name in "klm":
        held = shards.hold(*store.put(name, 200 * KB))
        assert held.path.read_bytes() == store.files[name]
        held.close()
    taken = (small_disk / "other").stat().st_size
    assert sum(map(len, stored(small_disk / "cache").values())) <= (1 << 20) - taken - 50 * KB


def test_a_disk_that_fills_up_during_a_file_costs_other_files(
    store: Store, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = ShardCache(place, 10 * KB)
    old = {store.put(name, KB)[1].sha256 for name in "xy"}
    for name in "xy":
        shards.hold(*store.put(name, KB)).close()

    class Full(FileIO):
        def write(self, data: Any) -> int:
            if self.tell() >= 2000 and old <= set(stored(place)):
                super().write(data[:300])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    monkeypatch.setattr(download, "FileIO", Full)
    remote, info = store.put("a", 3000)
    assert shards.hold(remote, info).path.read_bytes() == store.files["a"]
    assert len(old & set(stored(place))) == 1


def test_a_full_disk_with_nothing_to_remove_is_an_error_and_requests_no_more(
    store: Store, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = ShardCache(place, 10 * KB, patience=0.5)

    class Full(FileIO):
        def write(self, data: Any) -> int:
            usage = type("Usage", (), {"total": 1 << 30, "free": 100})
            monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(download, "FileIO", Full)
    with pytest.raises(StorageError, match=r"no room for fake://store/a .*or the disk"):
        shards.hold(*store.put("a", KB))
    assert store.asked == [("a", 0, 1000)]


def test_after_a_restart_undamaged_files_are_used_again(
    store: Store, place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    good, damaged, short = (store.put(name, 2 * KB) for name in ("good", "damaged", "short"))
    shards = ShardCache(place, 10 * KB)
    for file in (good, damaged, short):
        shards.hold(*file).close()
    # As a power cut leaves files that were not flushed to the disk.
    (place / damaged[1].sha256).write_bytes(bytes(2 * KB))
    os.truncate(place / short[1].sha256, 1200)
    store.asked.clear()
    (tmp_path / "boot_id").write_text("another start\n")
    monkeypatch.setattr(ledger, "_BOOT_ID", tmp_path / "boot_id")
    shards = ShardCache(place, 10 * KB)
    for file in (good, damaged, short):
        held = shards.hold(*file)
        assert held.path.read_bytes() == store.files[file[1].file]
    assert {name for name, _, _ in store.asked} == {"damaged", "short"}
    store.asked.clear()
    ShardCache(place, 10 * KB).hold(*good)
    assert store.asked == []


def test_a_truncated_file_is_fetched_again(store: Store, place: Path) -> None:
    shards = ShardCache(place, 10 * KB)
    remote, info = store.put("a", 1500)
    shards.hold(remote, info).close()
    os.truncate(place / info.sha256, 700)
    assert shards.hold(remote, info).path.read_bytes() == store.files["a"]
    assert len(store.asked) == 4


def test_errors_leave_no_file_open_and_no_lock_behind(store: Store, place: Path) -> None:
    shards = ShardCache(place, 2 * KB, patience=0.05)
    remote, info = store.put("a", KB)
    kept = shards.hold(*store.put("kept", KB))
    before = len(os.listdir("/proc/self/fd"))
    store.answer = lambda data: bytes(len(data))
    for _ in range(20):
        with pytest.raises(CorruptShardError):
            shards.hold(remote, info)
        with pytest.raises(StorageError):
            shards.hold(*store.put("large", 2 * KB))
    assert len(os.listdir("/proc/self/fd")) == before
    store.answer = lambda data: data
    shards.hold(remote, info)
    kept.close()


# The forked process stays alive while its parent uses the cache.
FORKS = """
import threading

def answer(data):
    if os.getpid() == parent and len(asked) == 2:
        if {inside}:
            with shards.folder.lock():
                fork()
        else:
            fork()
        raise OSError("broken off")
    return data

def fork():
    global child
    child = os.fork()
    if not child:
        time.sleep(600)

parent, child = os.getpid(), 0
shards = ShardCache(place, 10_000, patience=2)
try:
    hold(shards, "a-3000")
except Exception as error:
    print(type(error).__name__)
held = hold(shards, "a-3000")
print(os.pread(held.handle, 9999, 0) == content("a-3000", 3000), flush=True)
os.kill(child, 9)
"""


@pytest.mark.parametrize("inside", [False, True])
def test_a_process_that_is_forked_keeps_no_lock(place: Path, inside: bool) -> None:
    with other(FORKS.replace("{inside}", str(inside)), place) as run:
        try:
            assert run.communicate(timeout=PATIENCE)[0].split() == ["StorageError", "True"]
        except subprocess.TimeoutExpired:
            run.kill()
            raise


def test_the_environment_names_folder_and_budget(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SHARDPREP_CACHE", str(place))
    monkeypatch.setenv("SHARDPREP_CACHE_GB", "0.25")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    shards = ShardCache()
    assert (shards.folder.path, shards.folder.budget) == (place, 250_000_000)
    assert shards.share == 50_000_000
    assert ShardCache(readers=2).share == 125_000_000
    assert ShardCache(tmp_path / "own", 7).folder.budget == 7
    monkeypatch.delenv("SHARDPREP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert ShardCache().folder.path == tmp_path / "caches" / "shardprep"


def test_without_a_budget_half_of_the_free_disk_is_used(
    store: Store, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SHARDPREP_CACHE_GB", raising=False)
    ShardCache(place, 10 * KB).hold(*store.put("a", KB)).close()
    usage = type("Usage", (), {"total": 1 << 30, "free": 5000})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert ShardCache(place).folder.budget == 3000


@pytest.mark.parametrize("name", ["SHARDPREP_CACHE_GB", "LOCAL_WORLD_SIZE"])
@pytest.mark.parametrize("text", ["much", "-1", "0", "nan", "inf"])
def test_a_variable_that_is_not_a_positive_number_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(StorageError, match=f"{name}: is '{text}', expected a positive number"):
        ShardCache(place)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=f"{tmp_path}/file"):
        ShardCache(tmp_path / "file" / "cache")


def test_a_pickled_cache_has_the_same_folder_and_its_own_counters(
    store: Store, place: Path
) -> None:
    shards = ShardCache(place, 10 * KB, readers=4, patience=7)
    remote, info = store.put("a", KB)
    shards.hold(remote, info).close()
    copy = pickle.loads(pickle.dumps(shards))
    assert (copy.folder.path, copy.folder.budget, copy.share) == (place, 10 * KB, 2500)
    assert copy.patience == 7
    assert copy.traffic.files == 0
    copy.hold(remote, info)
    assert len(store.asked) == 1


def test_a_link_in_place_of_a_file_is_not_followed(
    store: Store, place: Path, tmp_path: Path
) -> None:
    shards = ShardCache(place, 10 * KB)
    remote, info = store.put("a", KB)
    (tmp_path / "precious").write_bytes(b"precious")
    for path in (shards.folder.part(info), place / info.sha256):
        path.symlink_to(tmp_path / "precious")
        with pytest.raises(StorageError):
            shards.hold(remote, info)
        path.unlink()
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_other_files_in_the_folder_are_left_alone(store: Store, place: Path) -> None:
    shards = ShardCache(place, KB)
    (place / "notes.txt").write_bytes(bytes(5 * KB))
    for name in "ab":
        shards.hold(*store.put(name, KB)).close()
    assert (place / "notes.txt").stat().st_size == 5 * KB


def test_a_file_is_never_removed_while_it_is_opened(store: Store, place: Path) -> None:
    """Files that are opened just as they are given up are fetched again, and are right."""
    shards = ShardCache(place, 2 * KB)
    files = [store.put(name, KB) for name in "abc"]
    wrong: list[str] = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(200):
            remote, info = draw.choice(files)
            held = shards.hold(remote, info)
            if os.pread(held.handle, 9999, 0) != store.files[info.file]:
                wrong.append(info.file)
            held.close()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(store.asked) > 3


def test_damage_in_the_cache_is_fetched_again_and_damage_in_the_store_is_not(
    store: Store, place: Path
) -> None:
    shards = ShardCache(place, 10 * KB)
    remote, info = store.put("a", 2 * KB)
    path = shards.hold(remote, info).path
    assert not shards.renew(remote, info)
    assert len(store.asked) == 2
    data = bytearray(store.files["a"])
    data[7] ^= 1
    path.write_bytes(data)
    assert shards.renew(remote, info)
    assert shards.hold(remote, info).path.read_bytes() == store.files["a"]
    assert len(store.asked) == 4


def test_the_start_of_another_machine_leaves_files_that_are_being_read(
    store: Store, place: Path
) -> None:
    shards = ShardCache(place, 10 * KB, patience=2)
    remote, info = store.put("a", KB)
    held = shards.hold(remote, info)
    shards.hold(*store.put("b", KB)).close()
    (place / "lock").write_bytes(b"another start\n")
    again = ShardCache(place, 10 * KB, patience=2)
    assert sum(name.endswith(".part") for name in stored(place)) == 1
    assert again.hold(remote, info).path == held.path
    assert len(store.asked) == 2


def test_a_download_without_progress_elsewhere_is_an_error_in_the_end(
    store: Store, place: Path
) -> None:
    shards = ShardCache(place, 10 * KB, patience=0.3)
    remote, info = store.put("a", KB)
    part = shards.folder.claim(info)
    assert part is not None
    with pytest.raises(StorageError, match=r"nothing has come for 0 s.*\.part open, and end it"):
        shards.hold(remote, info)
    shards.folder.unclaim(part)
    assert shards.hold(remote, info).path.read_bytes() == store.files["a"]


def test_files_are_looked_at_only_if_room_is_short(
    store: Store, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cachefolder, "_ON_THEIR_WAY", 0)
    shards = ShardCache(place, 10 * KB)
    shards.hold(*store.put("first", KB)).close()
    looks = []
    entries = cachefolder.CacheFolder._entries

    def counted(folder: cachefolder.CacheFolder) -> Any:
        looks.append(1)
        return entries(folder)

    monkeypatch.setattr(cachefolder.CacheFolder, "_entries", counted)
    for number in range(9):
        shards.hold(*store.put(f"{number}", KB)).close()
    assert not looks
    shards.hold(*store.put("one more", KB)).close()
    assert looks
    assert sum(map(len, stored(place).values())) == 10 * KB
    # The count is right, also after files were removed and a download failed.
    store.answer = lambda data: bytes(len(data))
    with pytest.raises(CorruptShardError):
        shards.hold(*store.put("wrong", KB))
    with shards.folder.lock() as counted_bytes:
        assert counted_bytes.used == sum(map(len, stored(place).values()))


def test_workers_of_a_data_loader_divide_the_share_of_their_process(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = ShardCache(place, 12 * KB, readers=2)
    assert shards.share == 6 * KB
    worker = SimpleNamespace(num_workers=3)
    monkeypatch.setattr("torch.utils.data.get_worker_info", lambda: worker)
    assert shards.share == 2 * KB
