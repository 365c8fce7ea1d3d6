"""What is delivered of small sets and of uint8: every way is measured, and the page has it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from scripts.bench.delivery import __main__ as delivery

ROOT = Path(__file__).parents[3]


def test_every_way_is_measured_and_compared(tmp_path: Path) -> None:
    lengths = delivery.lengths_of(None, 12)
    result = delivery.measure(lengths, 6, tmp_path, batch=2, seconds=0.02)
    for kind in delivery.KINDS:
        rates = [own[0] for own in result[kind]["segments"].values()]
        large, small, stored, widened, limit = rates
        expected = [small / large, large / limit, stored / large, widened / large]
        assert list(result[kind]["ratios"].values()) == pytest.approx(expected, rel=0.01, abs=1e-3)
    assert len(delivery.table(result).splitlines()) == 2 + 5 + 3 + 4


def test_the_ways_deliver_what_they_say(tmp_path: Path) -> None:
    lengths = delivery.lengths_of(None, 8)
    floats = delivery.pack(tmp_path / "a", "float16", lengths)
    stored = delivery.pack(tmp_path / "b", "uint8", lengths)
    assert (lengths >= delivery.SHORTEST).all()
    found = {
        str(next(delivery.deliver(folder, 4, dtype))[0].dtype)
        for folder, dtype in [(floats, None), (stored, delivery.torch.uint8), (stored, None)]
    }
    assert found == {"torch.float16", "torch.uint8", "torch.float32"}
    assert np.array_equal(delivery.lengths_of(None, 8), lengths)


def test_the_page_has_the_figures() -> None:
    result = json.loads((ROOT / "scripts" / "results" / "delivery.json").read_text())
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    (section,) = re.findall(r"^## Small sets and bytes\n(.*?)^## ", page, re.M | re.S)
    assert delivery.table(result) in section
    assert result["date"] in section
