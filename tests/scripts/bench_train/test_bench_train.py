"""All ways to train are measured alike, and the counted operations are those of the model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from click.testing import CliRunner
from torch import nn

from scripts.bench_train import __main__ as bench
from scripts.bench_train import arithmetic, measurement, summary
from scripts.bench_train import homework_model as models

pytestmark = pytest.mark.slow


def test_a_linear_layer_is_counted_by_hand() -> None:
    # 3 rows x 7 x 5 products and sums, forward and twice as many backward.
    flops = arithmetic.train_flops(nn.Linear(7, 5), torch.randn(2, 3, 7))
    assert flops == 3 * (2 * 3 * 7 * 5)
    assert arithmetic.utilisation(1000.0, flops, 1e6) == pytest.approx(0.63)


@pytest.mark.parametrize(
    ("capability", "on_gpu", "expected"),
    [
        ("NO AVX", False, ("no",)),
        ("AVX2", False, ("no",)),
        ("AVX2", True, ("no", "bf16")),
        ("AVX512", False, ("no", "bf16")),
        # An ARM CPU.
        ("DEFAULT", False, ("no", "bf16")),
    ],
)
def test_what_takes_many_times_as_long_is_measured_only_if_asked_for(
    monkeypatch: pytest.MonkeyPatch, capability: str, on_gpu: bool, expected: tuple[str, ...]
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert arithmetic.worthwhile_precisions(on_gpu=on_gpu) == expected


def test_all_products_of_the_block_are_counted() -> None:
    dim, heads, head_dim, frames, mels, speakers = 16, 2, 8, 128, 40, 5
    model = models.HomeworkModel(
        mels, speakers, dim=dim, heads=heads, head_dim=head_dim, kind="boss", axis="right"
    )
    inner = heads * head_dim
    frame = mels * dim + 2 * 2 * dim * 4 * dim  # prenet, two feed-forward modules
    frame += 4 * dim * inner + 3 * frames * inner  # projections; content, position and value
    frame += dim * 4 * dim + 2 * dim * dim + 31 * 2 * dim  # the convolution module
    frame += dim * dim + dim  # the pooling's two layers; its sum is elementwise
    expected = 3 * 2 * (frames * frame + dim * speakers)
    found = arithmetic.train_flops(model, torch.randn(2, frames, mels))
    assert found == pytest.approx(expected, rel=1e-6)


def test_the_measured_peak_is_positive_and_known_gpus_are_told_apart() -> None:
    assert arithmetic.matmul_peak(torch.device("cpu"), "no", size=64) > 0
    nominal = arithmetic.nominal_peak
    assert nominal("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert nominal("NVIDIA H100 PCIe", "bf16") == 756e12
    assert nominal("NVIDIA A100-SXM4-80GB", "no") == 19.5e12
    assert nominal("cpu", "no") is None


def measured(rate: float, waiting: float = 0.1) -> dict[str, float]:
    return {"samples_per_s": rate, "waiting": waiting, "peak_memory_mib": rate}


def test_ratios_are_of_medians_and_to_the_best_of_the_homework() -> None:
    base = measurement.Spec("ours", "", "")
    ways = bench.contenders(base, ["no"], ["off"])
    assert list(ways) == [
        "homework, files, 0 workers",
        "homework, files, 2 workers",
        "homework, shards",
        "ours, float32",
        "ours, float32, one batch",
    ]
    given = ([9, 10, 11], [20, 5, 1], [40] * 3, [50, 60, 10], [100] * 3)
    rates = dict(zip(ways, given, strict=True))
    found = {name: [measured(rate) for rate in values] for name, values in rates.items()}
    peaks = {"no": {"measured": 1000.0, "nominal": None}}
    rows = summary.summarise(found, ways, 4.0, peaks)
    assert [row["samples_per_s"] for row in rows] == [10, 5, 40, 50, 100]
    assert rows[3]["share_of_peak"] == pytest.approx(0.2)
    assert rows[3]["share_of_nominal_peak"] is None
    assert rows[3]["peak_memory_mib"] == 60
    assert summary.ratios(rows) == [
        {
            "name": "ours, float32",
            "to_homework": 5.0,
            "to_homework_on_shards": 1.25,
            "to_one_batch": 0.5,
        }
    ]
    (alone,) = summary.ratios(rows[3:4])
    assert {value for key, value in alone.items() if key.startswith("to_")} == {None}


def test_every_way_is_measured_in_each_precision_and_compiled() -> None:
    ways = bench.contenders(measurement.Spec("ours", "", ""), ["no", "bf16"], ["off", "default"])
    own = [way for way in ways.values() if way.kind == "ours"]
    assert [(way.precision, way.compile) for way in own] == [
        ("no", "off"),
        ("no", "default"),
        ("bf16", "off"),
        ("bf16", "default"),
    ]
    assert {way.precision for way in ways.values() if way.kind.startswith("homework")} == {"no"}


def test_a_way_that_fails_is_named_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(spec: Any, threads: int) -> dict[str, float]:
        if spec.kind == "homework shards":
            raise RuntimeError("exit code 1: no memory")
        return measured(1.0)

    monkeypatch.setattr(bench, "measure_apart", measure)
    ways = bench.contenders(measurement.Spec("ours", "", ""), ["no"], ["off"])
    failed: dict[str, str] = {}
    found = bench.measure_batch(ways, 2, 1, failed)
    assert "homework, shards" not in found
    assert failed == {"batch 32: homework, shards": "exit code 1: no memory"}
    assert all(len(rows) == 2 for rows in found.values())


def test_a_measurement_is_made_in_a_process_of_its_own() -> None:
    # bfloat16 would take six minutes on a CPU that is slow with it.
    precision = arithmetic.worthwhile_precisions(on_gpu=False)[-1]
    found = bench.measure_apart(measurement.Spec("peak", "", "", precision=precision), 1)
    assert found["measured"] > 0
    assert found["nominal"] is None


def test_a_measurement_that_fails_tells_why() -> None:
    with pytest.raises(RuntimeError, match=r"exit code 1: .*no shards"):
        bench.measure_apart(measurement.Spec("homework shards", "none", "no shards"), 1)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Measure in this process: to start another one would take most of the time."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(bench, "measure_apart", lambda spec, _: measurement.measure(spec))
    monkeypatch.setattr(measurement, "CPU_MATMUL", 64)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from numbers(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from numbers(inner)
    elif isinstance(value, float):
        yield value


@pytest.mark.usefixtures("in_this_process")
def test_everything_is_measured_at_a_tiny_size(
    make_dataset: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "WORKERS", (0,))
    dataset, out = make_dataset(speakers=2, utterances=6), tmp_path / "train.json"
    words = ["--dataset", dataset, "--work", tmp_path / "work", "--out", out, "--batch", 4]
    words += ["--width", 16, "--heads", 2, "--precision", "no", "--no-compile", "--cpu"]
    words += ["--segments", 16, "--rounds", 1, "--threads", 1, "--whole-frames", 200]
    done = CliRunner().invoke(bench.main, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0
    result = json.loads(out.read_text())
    assert result["failed"] == {}
    (batch,) = result["batches"]
    assert (batch["batch"], batch["measured_steps"]) == (4, 4)
    assert all(row["samples_per_s"] > 0 for row in batch["ways"])
    (ratio,) = batch["ratios"]
    assert min(ratio[key] for key in ("to_homework", "to_homework_on_shards", "to_one_batch")) > 0
    assert all(math.isfinite(number) for number in numbers(result))
    assert result["whole"]["peak_memory_mib"] >= result["whole"]["before_mib"] > 0
    assert {"cpu", "cores", "date", "versions", "device", "threads"} <= set(result)
    assert "| ours, float32 |" in done.stdout
