"""A small data set and its shards, for programs that are called in many ways."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardprep import BuildOptions, build_shards
from tests.conftest import write_dataset

Run = Callable[..., subprocess.CompletedProcess[str]]
OPTIONS = "shardprep.BuildOptions(samples_per_shard=4, workers=2)"


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 24 labelled utterances; not to be changed."""
    return write_dataset(tmp_path_factory.mktemp("called") / "Dataset")


@pytest.fixture(scope="session")
def shards(source: Path) -> Path:
    """Its shards, built in this process; not to be changed."""
    options = BuildOptions(samples_per_shard=4, workers=1)
    build_shards(source, source.parent / "shards", options)
    return source.parent / "shards"


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of each file of a set."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.is_file()
    }


@pytest.fixture
def python(tmp_path: Path) -> Run:
    """`python("-c", program, *arguments)`: run the interpreter in an empty folder."""

    def run(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
        (tmp_path / "empty").mkdir(exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
        return subprocess.run(
            [sys.executable, *map(str, words)],
            **{
                "cwd": tmp_path / "empty",
                "env": environment,
                "capture_output": True,
                "text": True,
                **options,
            },
        )

    return run
