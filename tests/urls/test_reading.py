"""Sets read from a store: the same utterances as from a folder, whatever the network does."""

from __future__ import annotations

import functools
import hashlib
import http.server
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.http import HTTPFileSystem

from scripts.servers import object_store as servers
from shardprep import (
    BuildOptions,
    CorruptShardError,
    SegmentLoader,
    ShardSet,
    Split,
    StorageError,
    UtteranceLoader,
    build_shards,
    open_shards,
)
from shardprep.cache.shard_cache import ShardCache
from shardprep.cli.inspect import inspect
from shardprep.storage import connections
from tests.conftest import stored_bytes, wait_until, write_dataset

pytestmark = pytest.mark.remote

Samples = list[tuple[bytes, bytes, bytes]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("source") / "Dataset"
    return write_dataset(root, speakers=6, utterances=80, frames=(80, 120))


@pytest.fixture(scope="module", params=["none"])
def local(source: Path, request: pytest.FixtureRequest) -> Path:
    """A set with some 190 shards of train, of which a small cache keeps few."""
    folder = source.parent / f"shards-{request.param}"
    options = BuildOptions(samples_per_shard=2, val_fraction=0.2, workers=1, codec=request.param)
    build_shards(source, folder, options)
    return folder


@pytest.fixture(scope="module")
def url(store: Any, local: Path) -> str:
    """The URL of the same set in the store."""
    files, place = fsspec.filesystem("s3"), store.url(f"reading/{local.name}")
    for path in local.iterdir():
        files.pipe(f"{place}/{path.name}", path.read_bytes())
    return str(place)


@pytest.fixture
def cached(tmp_path: Path) -> Callable[..., ShardSet]:
    """`cached(url, share)`: the set, with a cache of this share of the train split's bytes."""

    def make(url: str, share: float = 2.0, **options: Any) -> ShardSet:
        options = {"patience": 400.0, "readers": 1, **options}
        shards = open_shards(url, ShardCache(tmp_path / "cache", **options))
        nbytes = sum(shard.bytes for shard in shards.manifest.splits["train"].shards)
        return open_shards(url, ShardCache(tmp_path / "cache", int(share * nbytes), **options))

    return make


def samples(batches: Any) -> Samples:
    return [
        tuple(batch[name].numpy().tobytes() for name in ("mel", "label", "length"))  # type: ignore[misc]
        for batch in batches
    ]


def loader(split: Split, order: Any = "windowed", **options: Any) -> SegmentLoader:
    chosen = {"batch_size": 8, "segment_frames": 32, "lanes": 2, "window_shards": 1, "seed": 3}
    return SegmentLoader(split, order=order, **{**chosen, **options})  # type: ignore[arg-type]


def complete_files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if len(path.name) == 64]


@pytest.mark.parametrize("local", ["none", "zstd"], indirect=True)
@pytest.mark.parametrize("order", ["windowed", "global"])
def test_batches_are_those_of_a_folder(
    local: Path, url: str, cached: Callable[..., ShardSet], order: str
) -> None:
    own, other = loader(open_shards(local)["train"], order), loader(cached(url)["train"], order)
    for _ in range(2):
        assert samples(own) == samples(other)
    assert [open_shards(local)["val"].read(n).tobytes() for n in range(9)] == [
        cached(url)["val"].read(n).tobytes() for n in range(9)
    ]


def test_plain_http_gives_the_same(
    local: Path, store: Any, url: str, cached: Callable[..., ShardSet]
) -> None:
    place = store.http_url(f"reading/{local.name}")
    own, other = loader(open_shards(local)["train"]), loader(cached(place, 0.12)["train"])
    assert samples(own) == samples(other)
    connections.forget_connections()
    HTTPFileSystem.clear_instance_cache()


@pytest.fixture
def plain_web(local: Path) -> Iterator[str]:
    """The set on a web server without ranges."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(local))
    handler.log_message = lambda *arguments: None  # type: ignore[attr-defined]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        connections.forget_connections()
        HTTPFileSystem.clear_instance_cache()
        server.shutdown()
        thread.join()


def test_a_web_server_without_ranges_suffices(
    local: Path, plain_web: str, cached: Callable[..., ShardSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("shardprep.cache.download.CHUNK", 20_000)
    own, other = loader(open_shards(local)["train"]), loader(cached(plain_web)["train"])
    assert samples(own) == samples(other)


def test_a_position_is_resumed_by_other_ranks_and_from_a_folder(
    local: Path, url: str, cached: Callable[..., ShardSet]
) -> None:
    whole = samples(loader(open_shards(local)["train"]))
    begun = loader(cached(url, 0.5)["train"])
    batches = iter(begun)
    assert samples(itertools.islice(batches, 5)) == whole[:5]
    state = json.loads(json.dumps(begun.state_dict()))
    assert samples(batches) == whole[5:]
    pair = [
        loader(cached(url)["train"], batch_size=4, rank=rank, world_size=2) for rank in range(2)
    ]
    for half in pair:
        half.load_state_dict(state)
    halves = [samples(half) for half in pair]
    joined = [
        tuple(a + b for a, b in zip(*both, strict=True)) for both in zip(*halves, strict=True)
    ]
    assert joined == whole[5:]


def test_with_a_cache_of_a_tenth_every_utterance_comes_once_and_the_budget_holds(
    local: Path, url: str, cached: Callable[..., ShardSet], tmp_path: Path
) -> None:
    shards = cached(url, 0.1)
    files: Any = shards._origins[0].files
    budget, most, done = files.cache.folder.budget, [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            most[0] = max(most[0], stored_bytes(tmp_path / "cache"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        options: Any = {"drop_last": False}
        own = loader(open_shards(local)["train"], **options)
        assert samples(own) == samples(loader(shards["train"], **options))
    finally:
        done.set()
        watcher.join()
    assert 0 < most[0] <= budget


def test_whole_utterances_come_once_in_groups_that_fit(
    local: Path, url: str, cached: Callable[..., ShardSet]
) -> None:
    split, own = cached(url, 0.1)["train"], open_shards(local)["train"]
    batches = UtteranceLoader(split, max_frames=600)
    assert len(batches._groups) > 3
    seen: dict[int, bytes] = {}
    for batch in batches:
        for row, index in enumerate(batch["index"].tolist()):
            assert index not in seen
            seen[index] = batch["mel"][row, : batch["length"][row]].numpy().tobytes()
    assert seen == {n: own.read(n).tobytes() for n in range(len(own))}


def test_training_and_validation_share_a_cache_that_is_too_small_for_both(
    local: Path, url: str, cached: Callable[..., ShardSet]
) -> None:
    shards, own = cached(url, 0.12, patience=5.0), open_shards(local)
    training, expected = loader(shards["train"]), loader(own["train"])
    found = []
    for number, batch in enumerate(training):
        found += samples([batch])
        if number % 8 == 4:
            indices = [n for b in UtteranceLoader(shards["val"]) for n in b["index"].tolist()]
            assert sorted(indices) == list(range(len(own["val"])))
    assert found == samples(expected)


def test_global_order_with_too_small_a_cache_is_refused_with_the_remedy(
    url: str, cached: Callable[..., ShardSet]
) -> None:
    with pytest.raises(StorageError, match=r"order windowed.*SHARDPREP_CACHE_GB"):
        loader(cached(url, 0.5)["train"], "global")


def test_opening_inspecting_and_reading_send_only_get(
    url: str, proxy: Any, cached: Callable[..., ShardSet], run_inspect: Callable[[str], str]
) -> None:
    samples(loader(cached(url)["train"]))
    assert "train" in run_inspect(url)
    assert {line.method for line in proxy.log} == {"GET"}
    assert [line.path for line in proxy.log if "?" in line.path] == []


@pytest.fixture
def run_inspect(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[str], str]:
    monkeypatch.setenv("SHARDPREP_CACHE", str(tmp_path / "cache"))

    def run(url: str) -> str:
        inspect.main([url], standalone_mode=False)
        return capsys.readouterr().out

    return run


# A rank of a job: reads an epoch, prints the SHA-256 of its batches, and ends with its stdin. Until
# then it continues to fetch what the next epoch begins with, which another rank may need now.
RANK = """
import hashlib, os, sys
from shardprep import SegmentLoader, open_shards
from shardprep.cache.shard_cache import ShardCache
url, folder, budget, rank, world = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
shards = open_shards(url, ShardCache(folder, budget, patience=400))
batches = SegmentLoader(shards["train"], batch_size=8 // world, segment_frames=32, lanes=4,
    window_shards=1, seed=3, order="windowed", rank=rank, world_size=world)
digest = hashlib.sha256()
for batch in batches:
    digest.update(batch["mel"].numpy().tobytes())
print(digest.hexdigest(), flush=True)
sys.stdin.read()
"""


def ranks(url: str, folder: Path, budget: int, world: int) -> list[subprocess.Popen[str]]:
    return [
        subprocess.Popen(
            [sys.executable, "-c", RANK, url, folder, str(budget), str(rank), str(world)],
            env={**os.environ, "LOCAL_WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]


@pytest.mark.slow
def test_ranks_of_a_machine_fetch_each_object_once(
    local: Path, url: str, proxy: Any, tmp_path: Path
) -> None:
    shards = open_shards(local).manifest.splits["train"].shards
    size = sum(shard.bytes for shard in shards)
    running = ranks(url, tmp_path / "cache", 4 * size, 2)
    # Only when all have read their epoch may the first one end.
    said = [run.stdout.readline() for run in running if run.stdout is not None]
    for run in running:
        run.communicate()
    own = open_shards(local)["train"]
    for rank, text in enumerate(said):
        digest = hashlib.sha256()
        for batch in loader(own, batch_size=4, lanes=4, rank=rank, world_size=2):
            digest.update(batch["mel"].numpy().tobytes())
        assert text.split() == [digest.hexdigest()]
    gets = [line.path.rpartition("/")[2] for line in proxy.log if ".tar" in line.path]
    assert sorted(gets) == sorted(shard.file for shard in shards)
    assert sum(line.bytes for line in proxy.log if ".tar" in line.path) == size


@pytest.mark.slow
def test_a_rank_that_is_killed_leaves_an_intact_cache(
    local: Path, url: str, proxy: Any, tmp_path: Path
) -> None:
    proxy.faults = type(proxy.faults)(bandwidth=1_500_000)
    (run,) = ranks(url, tmp_path / "cache", 10**8, 1)
    cache = tmp_path / "cache"
    wait_until(lambda: cache.exists() and len(complete_files(cache)) > 3, run)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    proxy.clear()
    (run,) = ranks(url, tmp_path / "cache", 10**8, 1)
    digest = hashlib.sha256()
    for batch in loader(open_shards(local)["train"], lanes=4):
        digest.update(batch["mel"].numpy().tobytes())
    assert run.communicate()[0].split() == [digest.hexdigest()]
    files = complete_files(tmp_path / "cache")
    assert len(files) == len(open_shards(local).manifest.splits["train"].shards) + 1
    assert all(hashlib.sha256(path.read_bytes()).hexdigest() == path.name for path in files)


def test_an_epoch_is_exact_through_faults_and_an_outage(
    local: Path, tmp_path: Path, cached: Callable[..., ShardSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        servers.object_store(tmp_path / "store") as store,
        servers.fault_proxy(*store.endpoint) as proxy,
    ):
        for name, value in {**store.environment, "AWS_ENDPOINT_URL": proxy.url}.items():
            monkeypatch.setenv(name, value)
        connections.forget_connections()
        files = fsspec.filesystem("s3", skip_instance_cache=True)
        files.put(f"{local}/", store.url("set/"), recursive=True)
        shards = cached(store.url("set"), 0.12, patience=600.0)
        proxy.faults = servers.Faults(busy=0.05, corrupt=50, truncate=47)
        batches = iter(loader(shards["train"]))
        found = samples(next(batches) for _ in range(7))
        with ThreadPoolExecutor(1) as thread:
            # Start the store in this thread, because it ends with the thread that started it.
            store.stop()
            rest = thread.submit(samples, batches)
            wait_until(lambda: proxy.unreached > 2)
            store.start()
            found += rest.result()
        assert found == samples(loader(open_shards(local)["train"]))
        connections.forget_connections()


def test_a_store_that_does_not_answer_is_an_error_after_the_patience(
    url: str, proxy: Any, cached: Callable[..., ShardSet]
) -> None:
    shards = cached(url, 0.12, patience=2.0)
    split = shards["train"]
    with proxy.faulty(refuse=True):
        began = time.monotonic()
        with pytest.raises(StorageError, match=r"train-\d+.tar: .*no answer for 2 s"):
            samples(loader(split))
        assert time.monotonic() - began >= 2


def test_a_set_that_is_replaced_while_it_is_read_is_noticed(
    source: Path, store: Any, cached: Callable[..., ShardSet]
) -> None:
    place = store.url("replaced")
    options = BuildOptions(samples_per_shard=10, val_fraction=0.2, workers=1)
    build_shards(source, place, options)
    shards = cached(place, 0.5)
    batches = iter(loader(shards["train"], prefetch=0))
    next(batches)
    shards.check_unchanged()
    build_shards(
        source,
        place,
        BuildOptions(samples_per_shard=10, val_fraction=0.2, seed=9, workers=1, overwrite=True),
    )
    with pytest.raises(CorruptShardError, match="set was changed while it was being read"):
        shards.check_unchanged()
    with pytest.raises(CorruptShardError, match=r"train-\d+.tar: .*not those|is missing"):
        samples(batches)


def test_files_in_the_cache_are_found_by_their_sha256(
    local: Path, url: str, cached: Callable[..., ShardSet], tmp_path: Path
) -> None:
    shards = cached(url)
    first = shards.manifest.splits["train"].shards[0]
    assert np.isfinite(shards["train"].read(0)).all()
    path = tmp_path / "cache" / first.sha256
    shutil.copy(path, tmp_path / "kept")
    assert (tmp_path / "kept").read_bytes() == (local / first.file).read_bytes()
    assert torch.equal(
        torch.from_numpy(shards["train"].read(0)),
        torch.from_numpy(open_shards(local)["train"].read(0)),
    )
