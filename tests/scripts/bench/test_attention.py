"""All ways to attend give the same result, and failures are reported."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from scripts.bench import attention as bench

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A process that a later test forks would wait for PyTorch's threads without end."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("way", ["sdpa", "flex"])
def test_every_way_gives_what_the_formula_gives(way: str) -> None:
    torch.manual_seed(0)
    frames = 9
    case = bench.Case("inference", 2, frames)
    q, k, v, relative = bench.make_inputs(case, torch.float64, torch.device("cpu"))
    distance = torch.arange(frames)[:, None] - torch.arange(frames)
    # Column n of the relative scores is of the distance frames - 1 - n, for query and key alike.
    bias = torch.stack(
        [relative[:, :, a].index_select(2, frames - 1 - distance[a]) for a in range(frames)], 2
    )
    expected = torch.softmax(q @ k.mT + bias, -1) @ v
    torch.testing.assert_close(getattr(bench, way)(q, k, v, relative), expected)


def test_a_way_that_fails_or_is_wrong_is_named_and_not_timed() -> None:
    def wrong(q: Tensor, k: Tensor, v: Tensor, relative: Tensor) -> Tensor:
        return bench.products(q, k, v, relative) + 1

    ways = {"products": bench.products, "flex": bench.flex, "wrong": wrong}
    case = bench.Case("training", 2, 16)
    found = bench.measure(case, ways, "no", torch.device("cpu"), rounds=1)
    assert list(found["milliseconds"]) == ["products"]
    assert "backward on CPU" in found["failed"]["flex"]
    assert "not close" in found["failed"]["wrong"]


def test_the_command_writes_what_it_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = (bench.Case("training", 2, 16), bench.Case("inference", 1, 40))
    monkeypatch.setattr(bench, "CPU_CASES", cases)
    out = tmp_path / "attention.json"
    words = ["--cpu", "--no-flex", "--rounds", "1", "--precision", "bf16", "--out", str(out)]
    done = CliRunner().invoke(bench.main, words)
    assert done.exit_code == 0, done.output
    written = json.loads(out.read_text())
    assert [case["frames"] for case in written["cases"]] == [16, 40]
    for case in written["cases"]:
        assert set(case["milliseconds"]) == {"products", "sdpa"}
    assert "| inference, 1 x 40 | bf16 | sdpa |" in done.output
