"""The table of a set has the rows of its index."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from shardprep import BuildOptions, build_shards, decode_npy, open_shards
from shardprep.cli import parquet

Cli = Callable[..., Any]


@pytest.mark.parametrize("kind", [("float16", "none"), ("uint8", "zstd")], ids="-".join)
def test_rows_name_every_utterance_and_where_its_matrix_is(
    edge_sets: dict[tuple[str, str], Path], tmp_path: Path, run_cli: Cli, kind: tuple[str, str]
) -> None:
    shards, codec = edge_sets[kind], kind[1]
    done = run_cli("inspect", shards, "--parquet", tmp_path / "table.parquet")
    assert done.returncode == 0, done.stderr
    rows = pyarrow.parquet.read_table(tmp_path / "table.parquet").to_pylist()
    shard_set = open_shards(shards)
    expected = [(name, n) for name in shard_set for n in range(len(shard_set[name]))]
    assert [(row["split"], row["index"]) for row in rows] == expected
    for row in rows:
        split, number = shard_set[row["split"]], row["index"]
        assert (row["key"], row["label"]) == (split.keys[number], split.labels[number])
        known = row["label"] >= 0
        assert row["speaker"] == (shard_set.speakers[row["label"]] if known else "")
        data = (shards / row["shard"]).read_bytes()[row["offset"] :][: row["nbytes"]]
        mel = decode_npy("mel.npy" if codec == "none" else "mel.npy.zst", data)
        assert mel is not None
        assert len(mel) == row["frames"]
        if kind[0] == "uint8":
            mel = mel.astype("float32") * row["step"] + row["minimum"]
        assert (mel == split.read(number)).all()
    assert any(row["label"] == -1 for row in rows)


def test_names_of_any_script_survive_and_rows_come_in_groups(
    source_of: Callable[..., Path], tmp_path: Path, run_cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of({"Zoë": (3, 4, 5), "王": (6, 7)})
    build_shards(source, tmp_path / "shards", BuildOptions(workers=1, val_fraction=0))
    monkeypatch.setattr(parquet, "_ROWS", 2)
    table = tmp_path / "table.parquet"
    assert run_cli("inspect", tmp_path / "shards", "--parquet", table).returncode == 0
    file = pyarrow.parquet.ParquetFile(table)
    assert file.num_row_groups == 3
    split = open_shards(tmp_path / "shards")["train"]
    assert file.read()["key"].to_pylist() == split.keys.tolist()
    assert sorted(file.read()["speaker"].to_pylist()) == ["Zoë"] * 3 + ["王"] * 2


def test_a_table_that_cannot_be_written_leaves_nothing(
    edge_set: Path, tmp_path: Path, run_cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parquet, "_columns", fail)
    done = run_cli("inspect", edge_set, "--parquet", tmp_path / "table.parquet")
    assert done.returncode == 6
    assert "No space left on device" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_without_pyarrow_the_extra_is_named(
    edge_set: Path, tmp_path: Path, run_cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ModuleNotFoundError(name, name=name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    done = run_cli("inspect", edge_set, "--parquet", tmp_path / "table.parquet")
    assert done.returncode == 2
    assert "shardprep[parquet]" in done.stderr


@pytest.mark.parametrize("other", [["--sample", "x"], ["--json"]])
def test_the_table_goes_with_no_other_option(
    other: list[str], edge_set: Path, tmp_path: Path, run_cli: Cli
) -> None:
    done = run_cli("inspect", edge_set, *other, "--parquet", tmp_path / "t.parquet")
    assert done.returncode == 2
    assert list(tmp_path.iterdir()) == []
