"""scripts.bench.codec: the sizes that it reports are those of the shards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from scripts.bench.codec import TYPES, main
from shardprep import BuildOptions, build_shards

RESULTS = Path(__file__).parents[3] / "scripts" / "results" / "codec.json"


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
