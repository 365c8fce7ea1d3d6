"""Other readers, in the environments that `make test-readers` makes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from shardprep import BuildOptions, build_shards
from tests.conftest import write_dataset

ROOT = Path(__file__).parents[2]
VARIABLE = "SHARDPREP_TEST_READERS"
KINDS = {
    "none": {},
    "zstd": {"codec": "zstd"},
    "float32": {"dtype": "float32"},
    "uint8": {"dtype": "uint8"},
}
Read = Callable[..., None]


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each kind, a folder that has `shards/` and `folder/shards/`."""
    place = tmp_path_factory.mktemp("readers")
    source = write_dataset(place / "Dataset", speakers=3, utterances=12, test_utterances=7)
    for kind, options in KINDS.items():
        chosen = BuildOptions(samples_per_shard=10, workers=1, **options)  # type: ignore[arg-type]
        for folder in ("shards", "folder/shards"):
            build_shards(source, place / kind / folder, chosen)
    return {kind: place / kind for kind in KINDS}


@pytest.fixture
def read(sets: dict[str, Path], tmp_path: Path) -> Read:
    """`read(environment, kind, script, argument)`: a script in an environment, beside shards."""
    environments = os.environ.get(VARIABLE)
    if environments is None:
        pytest.skip("run `make test-readers`")

    def run(environment: str, kind: str, script: str, argument: str) -> None:
        # Some readers leave files beside the shards, which others would find.
        folder = shutil.copytree(sets[kind], tmp_path / "sets")
        programs = (ROOT / environments / environment / "bin").resolve()
        path = [str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]
        done = subprocess.run(
            [programs / "python", Path(__file__).parent / script, argument],
            cwd=folder,
            env={
                **os.environ,
                "PATH": os.pathsep.join(path),
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                "HF_HOME": str(tmp_path / "huggingface"),
                "HF_HUB_OFFLINE": "1",
                "WIDS_CACHE": str(tmp_path / "wids"),
                "HOME": str(tmp_path),
                "OMP_NUM_THREADS": "1",
            },
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]

    return run
