"""`pip install shardprep` without an extra, from the package index."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

MOST_MEGABYTES = 60

READ = """
import sys
import shardprep

shards = shardprep.open_shards("shards")
for name in shards.splits:
    split = shards[name]
    streamed = {sample["__key__"]: sample["mel"] for sample in shardprep.stream("shards", name)}
    assert sorted(streamed) == sorted(split.keys)
    for index, key in enumerate(split.keys):
        assert (split.read(index) == streamed[key]).all()
assert "torch" not in sys.modules
try:
    shardprep.SegmentLoader
except shardprep.MissingExtraError as error:
    print(error)
"""


def test_shards_are_built_checked_and_read_without_torch(
    distribution: Callable[[str], Path],
    environment: Any,
    make_dataset: Callable[..., Path],
    tmp_path: Path,
) -> None:
    root, packages = Path(__file__).parents[2], tmp_path / "packages"
    wheel, constraints = distribution("wheel"), root / "constraints.txt"
    environment.pip("download", "--quiet", "-d", packages, "-c", constraints, wheel)
    names = [path.name for path in packages.iterdir()]
    assert not [name for name in names if name.startswith(("torch", "accelerate", "nvidia"))]
    assert sum(path.stat().st_size for path in packages.iterdir()) < MOST_MEGABYTES * 10**6
    environment.pip("install", "--no-index", "--find-links", packages, "shardprep")
    make_dataset(speakers=3, utterances=6)

    def shardprep(*words: str) -> str:
        return str(environment.succeed("shardprep", *words, cwd=tmp_path))

    shardprep("build", "Dataset", "shards", "--workers", "2", "--codec", "zstd")
    shardprep("verify", "shards", "--deep")
    shardprep("verify", "shards", "--against", "Dataset")
    assert "train" in shardprep("inspect", "shards")
    said = environment.succeed("python", "-c", READ, cwd=tmp_path)
    assert "pip install 'shardprep[torch]'" in said

    (tmp_path / "shards" / "split=train.index.npy").unlink()
    shard = tmp_path / "shards" / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-5000].replace(b"\x28\xb5", b"\x00\x00"))
    assert environment.run("shardprep", "verify", "shards", cwd=tmp_path).returncode == 1
    shardprep("repair", "shards", "--source", "Dataset", "--workers", "2")
    shardprep("verify", "shards", "--deep")

    help_text = shardprep("--help")
    for command in ("train", "predict", "score", "embed", "export"):
        assert f"  {command} " in help_text
        done = environment.run("shardprep", command, "run", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert "pip install 'shardprep[train]'" in done.stderr
        assert "Traceback" not in done.stderr
    done = environment.run("shardprep", "bench", "shards", cwd=tmp_path)
    assert done.returncode == 2
    assert "pip install 'shardprep[torch]'" in done.stderr
