"""The sentence about the bottleneck follows from the measurements."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shardprep.bench.bottleneck import Stages, cached_share, name_bottleneck, time_stages
from shardprep.bench.loaders import SegmentShape

CALM = {"faults": 0, "batches": 1000, "cached": 1.0, "to_limit": 0.5}


@pytest.mark.parametrize(
    ("stages", "codec", "found", "sentence"),
    [
        (
            Stages(1.0, 0.2, 0.7),
            "none",
            {},
            "Memory: copying the segments out of the maps takes 70% of a batch's time; "
            "the loader runs at 0.50 of the limit.",
        ),
        (
            Stages(1.0, 0.1, 0.8),
            "zstd",
            {"to_limit": 0.031},
            "The processor: inflating the chunks that the segments touch takes 80% of a batch's "
            "time; the loader runs at 0.03 of the limit.",
        ),
        (
            Stages(1.0, 0.6, 0.3),
            "none",
            {},
            "The processor: computing the order and the segment starts takes 60% of a batch's "
            "time; the loader runs at 0.50 of the limit.",
        ),
        (
            Stages(1.0, 0.1, 0.1),
            "none",
            {},
            "The processor: handing the batches over takes 80% of a batch's time; "
            "the loader runs at 0.50 of the limit.",
        ),
        (
            Stages(1.0, 0.2, 0.7),
            "none",
            {"faults": 1000},
            "The disk: 1,000 page faults in 1,000 batches waited for it, and the page cache holds "
            "100% of the shards.",
        ),
        (
            Stages(1.0, 0.1, 0.8),
            "zstd",
            {"cached": 0.6},
            "The disk: 0 page faults in 1,000 batches waited for it, and the page cache holds "
            "60% of the shards.",
        ),
    ],
    ids=["copying", "inflating", "order", "hand-over", "faults", "cache"],
)
def test_the_largest_part_is_named(
    stages: Stages, codec: str, found: dict[str, float], sentence: str
) -> None:
    assert name_bottleneck(stages, codec, **{**CALM, **found}) == sentence  # type: ignore[arg-type]


@pytest.mark.parametrize(("faults", "batches"), [(9, 10), (999, 1000)])
def test_few_faults_are_not_the_disk(faults: int, batches: int) -> None:
    found = {**CALM, "faults": faults, "batches": batches}
    sentence = name_bottleneck(Stages(1, 0, 1), "none", **found)  # type: ignore[arg-type]
    assert sentence.startswith("Memory")


def test_parts_that_overlap_make_no_negative_rest() -> None:
    stages = Stages(1.0, 0.6, 0.7)
    assert stages.rest == 0
    assert "takes 54% of" in name_bottleneck(stages, "none", **CALM)  # type: ignore[arg-type]


def test_the_page_cache_is_asked_about_every_page(tmp_path: Path) -> None:
    read, unread, empty = (tmp_path / name for name in ("read", "unread", "empty"))
    read.write_bytes(bytes(3 * 4096 + 1))
    read.read_bytes()
    # A hole that nobody has read has no pages.
    with open(unread, "wb") as file:
        file.truncate(12 * 4096)
    empty.touch()
    assert cached_share([read]) == 1.0
    assert cached_share([unread]) == 0.0
    assert cached_share([read, unread, empty]) == 4 / 16
    assert cached_share([empty]) == cached_share([]) == 1.0


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_every_part_of_a_batch_takes_time(
    edge_sets: dict[tuple[str, str], Path], codec: str
) -> None:
    shape = SegmentShape(4, 64, 7, np.dtype("<f2"))
    stages = time_stages(edge_sets["float16", codec], "train", shape, 0.01)
    assert min(stages.batch, stages.order, stages.gather) > 0
