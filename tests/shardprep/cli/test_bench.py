"""`shardprep bench` prints a table or JSON on stdout, notes on stderr, and exits as documented."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# webdataset leaves it to the garbage collector to close its files.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

Cli = Callable[..., subprocess.CompletedProcess[str]]
QUICK = ("--rounds", 1, "--seconds", 0.02, "--batch-size", 4, "--segment-frames", 32)


def test_the_table_names_every_loader_and_the_bottleneck(
    run_cli: Cli, edge_sets: dict[tuple[str, str], Path], edge_source: Path
) -> None:
    sets = [edge_sets["float16", codec] for codec in ("none", "zstd")]
    done = run_cli("bench", *sets, "--source", edge_source, *QUICK)
    assert done.returncode == 0
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert re.match(
        r"train: 28 utterances; batches of 4 segments of 32 x 7 float16; .+ cores", lines[0]
    )
    assert lines[1].split() == ["loader", "samples/s", "GB/s", "to", "files", "to", "limit"]
    rows = [
        line for line in lines if re.search(r"  [\d,]+ +\d+\.\d{3} +[\d.]+x +\d+\.\d{3}$", line)
    ]
    assert len(rows) == 9
    assert len({len(row) for row in [*rows, lines[1]]}) == 1
    assert rows[-1].startswith("limit: gather from memory ")
    assert rows[-1].endswith(" 1.000")
    for folder, codec in zip(sets, ("none", "zstd"), strict=True):
        assert f"{folder} ({codec}), a batch: in all " in done.stdout
    assert done.stdout.count("\nbottleneck: ") == 2


def test_json_has_all_that_the_table_has(run_cli: Cli, edge_set: Path) -> None:
    done = run_cli("bench", edge_set, "--json", *QUICK)
    assert done.returncode == 0
    report = json.loads(done.stdout)
    assert set(report) == {
        *("machine", "split", "utterances", "frames", "batch", "dtype", "rounds", "seconds"),
        *("loaders", "limit", "sets", "notes"),
    }
    assert set(report["loaders"][0]) == {
        *("name", "kind", "workers", "samples_per_s", "gb_per_s", "rounds", "to_files", "to_limit")
    }
    assert report["loaders"][0]["to_files"] is None
    (own,) = report["sets"]
    assert own["stages"]["batch"] > 0
    assert own["bottleneck"].endswith(".")
    assert set(report["machine"]) == {"cpu", "cores", "date", "versions"}


def test_a_smaller_batch_is_said_on_stderr(run_cli: Cli, edge_set: Path) -> None:
    done = run_cli("bench", edge_set, "--split", "test", "--rounds", 1, "--seconds", 0.01)
    assert done.returncode == 0
    assert done.stderr == "note: batches of 6, not 256: the split has no more utterances\n"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["bench"], 2, "Missing argument"),
        (["bench", "nowhere"], 2, "does not exist"),
        (["bench", "SHARDS", "--rounds", "0"], 2, "--rounds"),
        (["bench", "SHARDS", "--seconds", "0"], 2, "--seconds"),
        (["bench", "EMPTY"], 4, "is not a shard folder"),
        (["bench", "SHARDS", "EMPTY"], 4, "is not a shard folder"),
        (["bench", "SHARDS", "--split", "dev"], 4, "there is no split 'dev'"),
        (["bench", "SHARDS", "--source", "EMPTY"], 3, "metadata.json"),
        (["bench", "DAMAGED"], 1, "train-000001.tar: cannot be read"),
        (["bench", "CUT"], 1, "train-000001.tar: has 512 bytes, expected "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_exit_codes(
    run_cli: Cli, edge_set: Path, tmp_path: Path, words: list[str], code: int, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"SHARDS": edge_set, "EMPTY": tmp_path / "empty"}
    for name in ("DAMAGED", "CUT"):
        if name in words:
            places[name] = Path(shutil.copytree(edge_set, tmp_path / name))
    if "DAMAGED" in words:
        (places["DAMAGED"] / "train-000001.tar").unlink()
    if "CUT" in words:
        os.truncate(places["CUT"] / "train-000001.tar", 512)
    done = run_cli(*(places.get(word, word) for word in words))
    assert done.returncode == code
    assert done.stdout == ""
    assert message in done.stderr


def test_help_keeps_its_lines(run_cli: Cli) -> None:
    done = run_cli("bench", "--help")
    assert done.returncode == 0
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_the_other_commands_do_not_wait_for_torch() -> None:
    code = "import sys, shardprep.cli; print('torch' in sys.modules, 'webdataset' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
