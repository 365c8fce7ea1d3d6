"""Sets built from and into stores: the same bytes as a local build, or no readable set."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.http import HTTPFileSystem

from shardprep import BuildError, BuildOptions, StorageError, build_shards, open_shards
from shardprep.check.verify import verify_shards
from shardprep.storage import connections
from shardprep.storage.remote import Remote, locate
from tests.conftest import write_dataset

# Beside the set; it differs between copies of a data set.
TIMES = "source-times.npy"

pytestmark = pytest.mark.remote

OPTIONS: dict[str, Any] = {"samples_per_shard": 6, "val_fraction": 0.2, "workers": 1}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("source") / "Dataset", speakers=4, utterances=30)


@pytest.fixture(scope="module")
def local(source: Path) -> Path:
    """The set of a local build."""
    build_shards(source, source.parent / "shards", BuildOptions(**OPTIONS))
    return source.parent / "shards"


@pytest.fixture
def place(store: Any, request: pytest.FixtureRequest) -> str:
    """A URL at which there is nothing yet."""
    return str(store.url(f"building/{request.node.name}".replace("[", "-").replace("]", "")))


def objects(url: str) -> dict[str, bytes]:
    there = Remote(url)
    return {name: (there / name).read() for name in there.listing() if name != TIMES}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != TIMES}


def upload(folder: Path, url: str) -> str:
    store = fsspec.filesystem("s3")
    for path in folder.iterdir():
        store.pipe(f"{url}/{path.name}", path.read_bytes())
    return url


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHARDPREP_CACHE", str(tmp_path / "cache"))


def test_a_build_into_a_store_is_a_local_one_byte_for_byte(
    source: Path, local: Path, place: str
) -> None:
    build_shards(source, place, BuildOptions(**{**OPTIONS, "workers": 2}))
    assert objects(place) == files(local)
    assert build_shards(source, place, BuildOptions(**OPTIONS)).up_to_date


@pytest.mark.parametrize("way", ["s3", "http"])
def test_a_build_from_a_store_is_a_local_one_byte_for_byte(
    source: Path, local: Path, store: Any, place: str, way: str, tmp_path: Path
) -> None:
    upload(source, place)
    origin = place if way == "s3" else store.http_url(place.partition("test-bucket/")[2])
    build_shards(origin, tmp_path / "shards", BuildOptions(**OPTIONS))
    assert files(tmp_path / "shards") == files(local)
    connections.forget_connections()
    HTTPFileSystem.clear_instance_cache()


def test_a_busy_web_server_costs_no_utterance(
    source: Path, local: Path, store: Any, http_proxy: Any, place: str, tmp_path: Path
) -> None:
    upload(source, place)
    origin = store.http_url(place.partition("test-bucket/")[2], http_proxy.endpoint)
    with http_proxy.faulty(busy=0.2):
        report = build_shards(origin, tmp_path / "shards", BuildOptions(**OPTIONS))
    assert report.rejects == []
    assert files(tmp_path / "shards") == files(local)
    connections.forget_connections()
    HTTPFileSystem.clear_instance_cache()


@pytest.mark.slow
def test_what_is_busy_or_cut_off_is_sent_again(
    source: Path, local: Path, proxy: Any, place: str
) -> None:
    with proxy.faulty(busy=0.05, cut=5):
        build_shards(source, place, BuildOptions(**OPTIONS))
    assert any(line.status == 503 for line in proxy.log)
    assert objects(place) == files(local)


# Builds SOURCE into URL, and kills itself before file number N is sent.
KILLED = """
import os, signal, sys
from shardprep import BuildOptions, build_shards
from shardprep.storage.remote import Remote

def publish(self, real=Remote.publish, left=[int(sys.argv[3])]):
    if self.url.endswith((".tar", ".npy", "manifest.json")):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return real(self)

Remote.publish = publish
options = dict(samples_per_shard=6, val_fraction=0.2, workers=1, seed=int(sys.argv[4]))
build_shards(sys.argv[1], sys.argv[2], BuildOptions(overwrite=sys.argv[5] == "1", **options))
"""


def killed(source: Path, url: str, after: int, *, seed: int = 0, overwrite: bool = False) -> None:
    words = [str(source), url, str(after), str(seed), str(int(overwrite))]
    done = subprocess.run([sys.executable, "-c", KILLED, *words])
    assert done.returncode == -signal.SIGKILL


def test_a_build_that_is_killed_leaves_no_manifest_and_sends_only_the_rest_when_continued(
    source: Path, local: Path, place: str, proxy: Any
) -> None:
    killed(source, place, 5)
    assert "manifest.json" not in Remote(place).listing()
    there = {name for name in Remote(place).listing() if "/" not in name}
    assert len(there) == 5
    proxy.clear()
    report = build_shards(source, place, BuildOptions(**OPTIONS))
    assert report.shards_kept == 5
    sent = [line.path.split("?")[0] for line in proxy.log if line.method == "PUT"]
    shards = {path.name for path in local.glob("*.tar")}
    assert {path.rpartition("/")[2] for path in sent if path.endswith(".tar")} == shards - there
    # The build knows which shards exist without fetching them.
    assert not any(line.method == "GET" and line.path.endswith(".tar") for line in proxy.log)
    assert objects(place) == files(local)


@pytest.mark.parametrize("after", [3, 30])
def test_the_old_set_is_intact_until_the_new_one_is_complete(
    source: Path, local: Path, place: str, after: int, tmp_path: Path
) -> None:
    build_shards(source, place, BuildOptions(**OPTIONS))
    count = len(list(local.glob("*.tar"))) + len(list(local.glob("*.npy")))
    # Killed before a shard, and when everything but the manifest is there.
    killed(source, place, min(after, count - 1), seed=5, overwrite=True)
    old = objects(place)
    assert {name: data for name, data in old.items() if "/" not in name} == files(local)
    assert verify_shards(place, deep=True).intact
    options = BuildOptions(**OPTIONS, seed=5, overwrite=True)
    report = build_shards(source, place, options)
    assert report.shards_kept >= min(after, 3)
    build_shards(source, tmp_path / "new", BuildOptions(**OPTIONS, seed=5))
    assert objects(place) == files(tmp_path / "new") != files(local)


# Replaces the set in URL, and kills itself before file number N of the new one takes its place.
KILLED_AT_THE_END = """
import os, signal, sys
from shardprep import BuildOptions, build_shards
from shardprep.storage.remote import Remote

def move(self, to, real=Remote.move, left=[int(sys.argv[3])]):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, to)

Remote.move = move
options = BuildOptions(samples_per_shard=6, val_fraction=0.2, workers=1, seed=5, overwrite=True)
build_shards(sys.argv[1], sys.argv[2], options)
"""


@pytest.mark.parametrize("after", [0, 7])
def test_a_build_that_is_killed_as_it_replaces_a_set_is_finished_by_the_next(
    source: Path, local: Path, place: str, after: int, tmp_path: Path
) -> None:
    build_shards(source, place, BuildOptions(**OPTIONS))
    command = [sys.executable, "-c", KILLED_AT_THE_END, str(source), place, str(after)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    # Neither set is complete, so there is no manifest.
    assert "manifest.json" not in Remote(place).listing()
    report = build_shards(source, place, BuildOptions(**OPTIONS, seed=5))
    build_shards(source, tmp_path / "new", BuildOptions(**OPTIONS, seed=5))
    assert objects(place) == files(tmp_path / "new") != files(local)
    assert report.shards_kept == len(list((tmp_path / "new").glob("*.tar")))


def test_a_large_shard_is_sent_in_parts_and_appears_only_when_complete(
    tmp_path: Path, place: str, proxy: Any
) -> None:
    # 112 MB, because files of less than two parts of 50 MiB are sent in one piece.
    source = write_dataset(
        tmp_path / "Dataset", speakers=2, utterances=5, test_utterances=0, frames=(70_000, 70_000)
    )
    seen: list[set[str]] = []
    options = BuildOptions(dtype="float32", val_fraction=0.0, workers=1, samples_per_shard=100)
    real = Remote._call

    def call(self: Remote, method: str, *arguments: Any, **more: Any) -> Any:
        if method == "put_file" and self.url.endswith(".tar"):
            seen.append(set(Remote(place).listing()))
        return real(self, method, *arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Remote, "_call", call)
        build_shards(source, place, options)
    (shard,) = open_shards(place).manifest.splits["train"].shards
    assert shard.bytes > 100 << 20
    parts = [x for x in proxy.log if x.method == "PUT" and "partNumber=" in x.path]
    assert len(parts) >= 2
    assert seen == [set()]
    assert verify_shards(place).intact


def test_places_that_hold_something_else_are_refused(
    source: Path, place: str, run_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    (Remote(place) / "thesis.tex").write(b"years of work")
    done = run_cli("build", source, place)
    assert done.returncode == BuildError.exit_code == 5
    assert "holds other things than shards, such as thesis.tex" in done.stderr
    (Remote(place) / "manifest.json").write(b'{"of": "another program"}')
    done = run_cli("build", source, place, "--overwrite")
    assert done.returncode == 5
    assert "is not the manifest of a shard set" in done.stderr
    assert set(objects(place)) == {"thesis.tex", "manifest.json"}


def test_a_web_server_is_no_destination(
    source: Path, store: Any, run_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = run_cli("build", source, store.http_url("new"))
    assert done.returncode == StorageError.exit_code == 6
    assert "a web server can be read only" in done.stderr


def test_wrong_credentials_are_told_at_once(
    source: Path,
    store: Any,
    place: str,
    run_cli: Callable[..., subprocess.CompletedProcess[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    connections.forget_connections()
    for words in (("build", source, place), ("inspect", place), ("verify", place)):
        done = run_cli(*words)
        assert done.returncode == 6
        assert "credentials" in done.stderr
    connections.forget_connections()


@pytest.mark.parametrize("deep", [(), ("--deep",)])
def test_verify_finds_changed_missing_truncated_and_foreign_files(
    local: Path,
    place: str,
    deep: tuple[str, ...],
    run_cli: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    upload(local, place)
    assert run_cli("verify", place, *deep).returncode == 0
    changed, missing, short = (f"train-{n:06d}.tar" for n in range(3))
    data = bytearray((local / changed).read_bytes())
    data[3000] ^= 1
    there = locate(place)
    assert isinstance(there, Remote)
    (there / changed).write(bytes(data))
    (there / missing).remove()
    (there / short).write((local / short).read_bytes()[:-10240])
    (there / "extra.tar").write(b"what is this")
    done = run_cli("verify", place, *deep)
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert f"{changed}: its bytes are not those that the manifest names" in said
    assert f"{missing}: is missing" in said
    assert f"{short}: its bytes are not those that the manifest names" in said
    assert "extra.tar: does not belong to the set" in said
    assert "train-000003" not in said


def test_inspect_and_bench_run_on_a_url(
    local: Path, place: str, run_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    upload(local, place)
    own, other = run_cli("inspect", local, "--json"), run_cli("inspect", place, "--json")
    assert (own.returncode, other.returncode) == (0, 0)
    assert own.stdout.replace(str(local), place) == other.stdout
    # In a process of its own, because bench forks, and this process has computed in threads.
    command = [sys.executable, "-m", "shardprep", "bench", place, "--rounds", "1"]
    command += ["--seconds", "0.2", "--batch-size", "8"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert place in done.stdout


def test_a_killed_build_leaves_no_file_of_its_own_behind_when_it_ends(
    source: Path, local: Path, place: str
) -> None:
    killed(source, place, 2, seed=7)
    build_shards(source, place, BuildOptions(**OPTIONS))
    assert objects(place) == files(local)
