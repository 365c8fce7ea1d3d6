"""An append that is killed at any moment loses nothing, and whatever comes next finishes it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from shardprep import (
    BuildError,
    BuildOptions,
    FormatError,
    append_shards,
    build_shards,
    open_shards,
    repair_shards,
    verify_shards,
)
from shardprep.storage import connections
from shardprep.storage.remote import Remote

Contents = Callable[[Path], dict[str, str]]

APPEND = """
import torch
from shardprep import BuildOptions, append_shards
from shardprep.format import codecs

torch.set_num_threads(1)
DEADLY.append((codecs, "encode"))

def prepare(subject, folder):
    shutil.copytree(subject / "shards", folder)

def act(subject, folder):
    append_shards(subject / "B", folder, BuildOptions(workers=1))
"""
OPTIONS: dict[str, Any] = {"workers": 1, "samples_per_shard": 3, "on_error": "skip"}


@pytest.fixture
def subject(make_dataset: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder with two data sets, A and B, and a set of A."""
    for name, seed in (("A", 1), ("B", 2)):
        root = make_dataset(speakers=2, utterances=4, test_utterances=2, seed=seed)
        sorted(root.glob("*.pt"))[0].write_bytes(b"garbage")
        shutil.copytree(root, tmp_path / name)
        shutil.rmtree(root)
    build_shards(tmp_path / "A", tmp_path / "shards", BuildOptions(**OPTIONS))
    return tmp_path


def opens(folder: Path) -> bool:
    """Whether all of a set can be read; False if there is none now."""
    if not (folder / "manifest.json").exists():
        with pytest.raises(FormatError, match="interrupted while its files moved"):
            open_shards(folder)
        return False
    shards = open_shards(folder)
    for split in shards.values():
        for index in range(len(split)):
            split.read(index)
    return True


@pytest.mark.slow
def test_append_killed_at_any_step_loses_nothing_and_goes_on(
    subject: Path,
    contents: Contents,
    killed_at_every_step: Callable[[str, Path], list[Path]],
) -> None:
    old = contents(subject / "shards")
    folders = killed_at_every_step(APPEND, subject)
    expected = subject / "expected"
    shutil.copytree(subject / "shards", expected)
    append_shards(subject / "B", expected, BuildOptions(workers=1))
    done = contents(expected)
    assert len(folders) > 40
    without_set = 0
    for number, folder in enumerate(folders):
        now = {name: sha for name, sha in contents(folder).items() if not name.startswith(".")}
        tars = {name: sha for name, sha in old.items() if name.endswith(".tar")}
        assert tars.items() <= now.items()
        was_open = opens(folder)
        if was_open:
            assert now in (old, done)
        without_set += not was_open
        twin = Path(shutil.copytree(folder, subject / f"twin-{number}"))
        append_shards(subject / "B", folder, BuildOptions(workers=1))
        assert contents(folder) == done, folder
        assert verify_shards(folder, deep=True).intact
        # Other commands finish it too, or leave the old set as it was.
        if not was_open and number % 2:
            with pytest.raises(BuildError, match="built from another source"):
                build_shards(subject / "A", twin, BuildOptions(**OPTIONS))
        elif not was_open:
            notes = repair_shards(twin).notes
            assert notes == ["an interrupted `build --append` is finished now"]
        else:
            assert repair_shards(twin).intact
        found = {name: sha for name, sha in contents(twin).items() if not name.startswith(".")}
        assert found in ([done] if not was_open else [old, done])
    assert without_set > 3


class Killed(BaseException):
    """In place of SIGKILL, for a store in the memory of this process."""


@pytest.fixture
def memory() -> Iterator[None]:
    yield
    fsspec.filesystem("memory").store.clear()
    connections.forget_connections()


def objects(url: str) -> dict[str, bytes]:
    system, path = fsspec.core.url_to_fs(url)
    return {name.removeprefix(f"{path}/"): system.cat(name) for name in system.find(path)}


def test_append_in_a_store_killed_at_any_request_loses_nothing_and_goes_on(
    subject: Path, memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(url: str) -> None:
        system, path = fsspec.core.url_to_fs(url)
        for name in os.listdir(subject / "shards"):
            system.pipe(f"{path}/{name}", (subject / "shards" / name).read_bytes())

    left = [1 << 30]

    def deadly(name: str) -> None:
        original = getattr(Remote, name)

        def call(self: Remote, *arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return original(self, *arguments, **options)

        monkeypatch.setattr(Remote, name, call)

    for name in ("write", "remove", "move", "publish"):
        deadly(name)
    begin("memory://append/expected")
    append_shards(subject / "B", "memory://append/expected", BuildOptions(workers=1))
    done = objects("memory://append/expected")
    assert not [name for name in done if name.startswith(".")]
    before = {
        name: (subject / "shards" / name).read_bytes() for name in os.listdir(subject / "shards")
    }
    tars = {name: data for name, data in before.items() if name.endswith(".tar")}
    assert tars.items() <= done.items()
    without_set = 0
    for step in range(1, 100):
        url = f"memory://append/{step}"
        begin(url)
        left[0] = step
        try:
            append_shards(subject / "B", url, BuildOptions(workers=1))
        except Killed:
            pass
        else:
            break
        finally:
            left[0] = 1 << 30
        now = objects(url)
        assert tars.items() <= now.items()
        if now.get("manifest.json") == before["manifest.json"]:
            assert before.items() <= now.items()
        else:
            without_set += "manifest.json" not in now
        append_shards(subject / "B", url, BuildOptions(workers=1))
        after = objects(url)
        for one in (after, done):
            one.pop("source-times.npy", None)
        assert after == done, step
    assert without_set > 3
    assert step > 20
