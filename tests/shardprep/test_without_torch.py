"""What works where torch is not installed, and what the rest says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# Imitates an environment without these packages: to import them fails.
_HIDDEN = "import sys; sys.modules.update(torch=None, accelerate=None); "
_REMEDY = "Run: pip install 'shardprep[torch]'"


def run_hidden(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _HIDDEN + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    "code",
    [
        "shardprep.SegmentLoader",
        "shardprep.UtteranceLoader",
        "shardprep.open_shards(sys.argv[1])['train'].segments([0], [0], 8)",
        "from shardprep import SegmentLoader",
        "import shardprep.bench",
    ],
)
def test_what_needs_torch_names_its_extra(edge_set: Path, code: str) -> None:
    done = run_hidden(f"import shardprep; {code}", edge_set)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("shardprep.errors.MissingExtraError: the package torch is not installed")
    assert last.endswith(_REMEDY)


def test_reading_and_streaming_need_no_torch(edge_set: Path) -> None:
    done = run_hidden(
        "import shardprep\n"
        "path = sys.argv[1]\n"
        "train = shardprep.open_shards(path)['train']\n"
        "samples = {sample['__key__']: sample for sample in shardprep.stream(path)}\n"
        "assert sorted(samples) == sorted(train.keys)\n"
        "for index, key in enumerate(train.keys):\n"
        "    assert (train.read(index) == samples[key]['mel']).all()",
        edge_set,
    )
    assert (done.returncode, done.stderr) == (0, "")
