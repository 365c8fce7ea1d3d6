"""The comparison of codecs: sizes are those of the shards, and every setting is measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from scripts.bench import codec
from scripts.bench.codec import TYPES, Setting, main
from shardprep import BuildOptions, build_shards

RESULTS = Path(__file__).parents[3] / "scripts" / "results" / "codec.json"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[Setting]:
    settings = [Setting("float16", None), Setting("float16", 32), Setting("uint8", 64, 1)]
    monkeypatch.setattr(codec, "settings", lambda: iter(settings))
    monkeypatch.setattr(codec, "BATCH", 4)
    return settings


def test_every_setting_has_its_size_and_its_speed(
    small: list[Setting], make_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    dataset = make_dataset(speakers=2, utterances=2, frames=(200, 400))
    rows = codec.measure(dataset, tmp_path, utterances=4, rounds=1)
    names = [row["setting"] for row in rows]
    assert names[: len(small)] == [setting.name for setting in small]
    assert rows[0]["size_to_none"] == 1.0
    assert rows[2]["size_to_none"] < 0.6
    assert [("to_bare" in row) for row in rows] == [False, True, True, False]
    assert all(row["segments_per_s"] > 0 for row in rows)
    assert len(codec.table(rows).splitlines()) == 2 + len(rows)


def test_bare_inflating_covers_exactly_the_chunks_of_the_segments(
    small: list[Setting], make_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    dataset = make_dataset(speakers=2, utterances=2, frames=(200, 400))
    split = codec.build(dataset, tmp_path / "set", 3, Setting("float16", 32))
    assert len(split) == 3
    batches = codec.random_batches(split, 128)
    width = split.n_mels * 2
    for (indices, starts), (_, _, _, inflated) in zip(
        batches, codec.needed(split, 128), strict=True
    ):
        frames = split.frames[indices]
        ends = np.minimum(starts + 128, frames)
        chunks = [
            min(32, int(length) - 32 * number) * width
            for length, start, end in zip(frames, starts, ends, strict=True)
            for number in range(int(start) // 32, -(-int(end) // 32))
        ]
        assert inflated.tolist() == chunks


def test_sizes_of_types_are_those_of_shards(
    make_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = make_dataset(speakers=2, utterances=4), tmp_path / "codec.json"
    out.write_text('{"rows": [1]}')
    result = CliRunner().invoke(main, [str(source), "--types", "--out", str(out)])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(out.read_text())
    assert found["rows"] == [1]
    rows = found["types"]["rows"]
    assert [(row["dtype"], row["codec"]) for row in rows] == TYPES
    options = BuildOptions(dtype="uint8", val_fraction=0, workers=1)
    build_shards(source, tmp_path / "shards", options)
    size = sum(path.stat().st_size for path in (tmp_path / "shards").glob("train-*.tar"))
    (own,) = (row for row in rows if (row["dtype"], row["codec"]) == ("uint8", "none"))
    assert own["bytes"] == size
    assert own["to_float16"] == round(size / rows[0]["bytes"], 4)


def test_uint8_takes_little_more_than_half_of_float16() -> None:
    rows = json.loads(RESULTS.read_text())["types"]["rows"]
    sizes = {(row["dtype"], row["codec"]): row["to_float16"] for row in rows}
    assert sizes["uint8", "none"] <= 0.53
    assert sizes["uint8", "zstd"] < sizes["uint8", "none"] < sizes["float16", "zstd"]
