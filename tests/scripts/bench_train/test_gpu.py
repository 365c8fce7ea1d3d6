"""What is measured on a GPU is chosen by the time, and stands beside its prediction."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from click.testing import CliRunner

from scripts.bench_train import gpu, measurement
from scripts.bench_train.gpus import find
from scripts.bench_train.measurement import Spec
from scripts.bench_train.predict.__main__ import BATCHES
from scripts.bench_train.predict.__main__ import WAYS as PREDICTED_WAYS

BASE = Spec("ours", "Dataset", "shards", cpu=False, precision="bf16")


def found(rate: float) -> dict[str, float]:
    return {"samples_per_s": rate, "waiting": 0.01, "peak_memory_mib": 900.0}


def prediction(device: float, host: float, batch: int, *, fits: bool = True) -> dict[str, Any]:
    rate = batch / max(device, host)
    times = {"device_s": device, "host_s": host, "segments_per_s": rate}
    return {**times, "share_of_peak": 0.2, "fits": fits}


def test_all_that_is_asked_for_is_planned_and_predicted() -> None:
    specs = gpu.plan(BASE, gpu.ORDER)
    ours = [spec for spec in specs.values() if spec.kind == "ours"]
    assert {spec.compile for spec in ours if spec.batch == 32} == set(gpu.WAYS.values())
    assert {spec.batch for spec in ours} == set(BATCHES)
    assert {spec.placement for spec in ours if spec.batch in (32, 4096)} == {"device", "host"}
    assert {spec.kind for spec in specs.values()} == {"ours", "homework files", "homework shards"}
    assert set(PREDICTED_WAYS) == set(gpu.WAYS)
    expected = gpu.predictions(gpu.PREDICTIONS, find("NVIDIA H200"))
    assert {(gpu.way_of(spec), spec.batch) for spec in ours} <= set(expected)
    assert gpu.predictions(gpu.PREDICTIONS, None) == {}


def test_blocks_have_the_steps_for_some_seconds() -> None:
    spec = gpu.plan(BASE, gpu.ORDER)["boss, eager, batch 32"]
    blocks = measurement.WARM + measurement.MEASURED
    steps = gpu.block_steps(spec, 32_000.0)
    assert blocks * steps * 32 / 32_000.0 == pytest.approx(gpu.STEPS_SECONDS, rel=0.05)
    assert gpu.block_steps(spec, 1.0) == 1


def test_what_does_not_fit_takes_too_long_or_fails_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    specs = gpu.plan(BASE, gpu.ORDER[:5])
    expected = {("eager", 32): prediction(0.01, 0.02, 32)}
    expected["compiled", 4096] = prediction(1.0, 0.1, 4096, fits=False)
    clock = [0.0]

    def measure(spec: Spec, threads: int, seconds: float) -> dict[str, float]:
        clock[0] += 40.0
        if spec.kind == "homework files":
            raise RuntimeError("exit code 1: no memory")
        if spec.kind == "homework shards":
            raise subprocess.TimeoutExpired("python", seconds)
        return found(800.0)

    monkeypatch.setattr(gpu, "measure_apart", measure)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])
    # Time for six at 40 s each, but not for compiling in the last.
    rows, left_out = gpu.measure_all(specs, expected, minutes=4.0)
    assert [row["name"] for row in rows] == [
        "boss, eager, batch 32",
        "boss, graphs, batch 32",
        "boss, compiled, batch 32",
        "boss, eager, batch 4,096",
    ]
    assert left_out == {
        "the homework's loop, its files": "exit code 1: no memory",
        "the homework's loop, shards": "took too long",
        "boss, compiled, batch 4,096": "no time left",
    }
    assert (rows[0]["predicted"], rows[0]["ratio"]) == (1600.0, 2.0)
    assert rows[1]["predicted"] is None
    _, left_out = gpu.measure_all(specs, expected, minutes=60.0)
    assert left_out["boss, compiled, batch 4,096"] == "needs more memory than the GPU has"


def test_a_result_tells_how_much_slower_the_gpu_and_the_host_are() -> None:
    # Of the first, the GPU decides; of the second, the host.
    expected = {
        ("eager", 512): prediction(2.0, 1.0, 512),
        ("eager", 32): prediction(0.5, 1.0, 32),
    }
    specs = gpu.plan(BASE, (("eager", 512, "device"), ("eager", 32, "device")))
    rates = {512: 512 / 3.0, 32: 32 / 4.0}
    rows = [
        gpu.compare(name, spec, found(rates[spec.batch]), expected.get((way, spec.batch)))
        for name, spec in specs.items()
        if (way := gpu.way_of(spec)) is not None
    ]
    assert gpu.scales(rows, expected) == pytest.approx({"device": 1.5, "host": 4.0})
    assert gpu.scales([], expected) == {"device": 1.0, "host": 1.0}


def test_predicted_stands_beside_measured() -> None:
    spec = gpu.plan(BASE, gpu.ORDER)["boss, eager, batch 32"]
    row = gpu.compare("boss, eager", spec, found(1600.0), prediction(0.01, 0.016, 32))
    result = {"device": "NVIDIA X", "date": "2026-12-01", "rows": [row]}
    text = gpu.table({**result, "left_out": {"boss, graphs": "no time left"}})
    assert "| boss, eager | 1,600 | 16.0% | 2,000 | 1.25 | 1.0% | 900 |" in text
    assert "- left out: boss, graphs: no time left" in text


def test_without_a_gpu_the_command_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(gpu.main, [])
    assert done.exit_code == 2
    assert "--cpu" in done.output


def test_boss_is_measured_in_16_bits_that_the_gpu_multiplies() -> None:
    names = {"Tesla T4": "fp16", "NVIDIA H200": "bf16", "NVIDIA L4": "bf16"}
    for name, expected in names.items():
        assert gpu.half_precision(find(name), cpu=False) == expected
    assert gpu.half_precision(None, cpu=True) == "no"


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Measure in this process: to start another one would take most of the time."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(gpu, "measure_apart", lambda spec, *_: measurement.measure(spec))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_the_command_measures_all_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    words = ["--cpu", "--quick", "--out", str(out)]
    done = CliRunner().invoke(gpu.main, words, catch_exceptions=False)
    assert done.exit_code == 0
    result = json.loads(out.read_text())
    assert result["left_out"] == {}
    assert [row["name"] for row in result["rows"]] == [
        "boss, eager, batch 4",
        "boss, eager, batch 8, data on the host",
        "the homework's loop, its files",
        "the homework's loop, shards",
    ]
    assert all(row["segments_per_s"] > 0 for row in result["rows"])
    assert "| boss, eager, batch 4 |" in done.stdout
