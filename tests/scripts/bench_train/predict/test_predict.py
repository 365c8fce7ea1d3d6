"""Kernels, their arithmetic, bytes and times are those that one finds by hand."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState
from click.testing import CliRunner
from torch import Tensor, nn

from scripts.bench_train.gpus import GPUS, find
from scripts.bench_train.predict import __main__ as command
from scripts.bench_train.predict import check, rates, steps, table
from scripts.bench_train.predict.fuse import Kernel, fuse, kernels_of, traffic_of
from scripts.bench_train.predict.trace import Operation, Trace, fast_in_bfloat16, traced

ROOT = Path(__file__).parents[4]
RESULT = ROOT / "scripts" / "results" / "predict.json"
FLOAT = 4


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Steps on short segments; no accelerator is left."""
    monkeypatch.setattr(steps, "FRAMES", 24)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def kernels(trace: Trace, *, fused: bool) -> list[tuple[str, float]]:
    """Names and bytes of the kernels of a trace."""
    groups = fuse(trace.operations) if fused else [[x] for x in range(len(trace.operations))]
    names = ["+".join(trace.operations[index].name for index in group) for group in groups]
    return list(zip(names, traffic_of(trace, groups), strict=True))


def test_a_linear_layer_and_its_gradients_are_counted_by_hand() -> None:
    layer, x = nn.Linear(7, 5, bias=False), torch.randn(3, 7, requires_grad=True)
    with traced(like_gpu=True) as trace:
        layer(x).backward(torch.ones(3, 5))
    products = [one for one in trace.operations if one.kind == "product"]
    assert [one.flops for one in products] == [2 * 3 * 7 * 5] * 3
    forward, *backward = (one.bytes for one in products)
    assert forward == FLOAT * (3 * 7 + 7 * 5 + 3 * 5)
    assert backward == [forward, forward]


def test_views_make_no_kernel_and_repeated_elements_are_read_once() -> None:
    x = torch.randn(4, 6)
    with traced(like_gpu=True) as trace:
        x.view(3, 8)[:2].t().expand(5, 8, 2) + 1
    (only,) = trace.operations
    assert only.reads == {0: x.numel() * FLOAT}
    assert sum(only.writes.values()) == 5 * 2 * 8 * FLOAT


def test_parts_of_one_tensor_are_read_each_and_one_part_is_read_once() -> None:
    x = torch.randn(6, 4)
    with traced(like_gpu=True) as trace:
        torch.cat([x[:2], x[3:]])
        x[0] * x[0]
    cat, square = trace.operations
    assert sum(cat.reads.values()) == 5 * 4 * FLOAT
    assert sum(square.reads.values()) == 4 * FLOAT


def test_elementwise_operations_fuse_and_what_stays_within_is_not_moved() -> None:
    a, b, c = (torch.randn(10, 8) for _ in range(3))
    size = a.numel() * FLOAT
    with traced(like_gpu=True) as trace:
        kept = [(a * b + c).relu()]
    assert kernels(trace, fused=True) == [("mul+add+relu", 3 * size)]
    assert [moved for _, moved in kernels(trace, fused=False)] == [3 * size, 3 * size, size]
    assert len(kept) == 1


def test_what_another_kernel_needs_is_written() -> None:
    a = torch.randn(8, 8)
    size = a.numel() * FLOAT
    with traced(like_gpu=True) as trace:
        doubled = a * 2
        (doubled + 1) @ doubled
    assert kernels(trace, fused=True) == [("mul+add", 3 * size), ("mm", 2 * size)]


def test_a_reduction_along_rows_fuses_with_what_follows_and_another_does_not() -> None:
    a = torch.randn(10, 8)
    with traced(like_gpu=True) as rows:
        a - a.exp().sum(1, keepdim=True)
    assert [name for name, _ in kernels(rows, fused=True)] == ["exp+sum+sub"]
    with traced(like_gpu=True) as columns:
        a - a.exp().sum(0, keepdim=True)
    assert [name for name, _ in kernels(columns, fused=True)] == ["exp+sum", "sub"]


def test_kernels_form_no_circle() -> None:
    a, weight = torch.randn(8, 8), torch.randn(8, 8)
    with traced(like_gpu=True) as trace:
        normal = a * 2
        normal + normal @ weight
    # The sum needs the product, which needs what the first kernel makes.
    assert [name for name, _ in kernels(trace, fused=True)] == ["mul", "mm", "add"]


def test_a_weight_that_is_changed_in_place_is_read_and_written() -> None:
    weight, grad = torch.randn(8, 8), torch.randn(8, 8)
    with traced(like_gpu=True) as trace:
        weight.mul_(0.9).add_(grad, alpha=-0.1)
    assert kernels(trace, fused=True) == [("mul_+add_", 3 * weight.numel() * FLOAT)]


def test_attention_is_one_kernel_with_the_result_and_the_gradients_of_pytorchs() -> None:
    shape = (2, 3, 16, 8)  # (B, H, T, d)
    given = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    bias = torch.randn(2, 3, 16, 16, requires_grad=True)

    def run() -> tuple[Tensor, ...]:
        out = F.scaled_dot_product_attention(*given, attn_mask=bias)
        return out, *torch.autograd.grad(out.sin().sum(), [*given, bias])

    expected = run()
    with traced(like_gpu=True) as trace:
        found = run()
    torch.testing.assert_close(found, expected)
    forward, backward = (one for one in trace.operations if one.kind == "attention")
    assert forward.flops == 2 * (2 * 2 * 3 * 16 * 16 * 8)
    assert backward.flops == 2.5 * forward.flops
    assert forward.bytes == FLOAT * (4 * 2 * 3 * 16 * 8 + 2 * 3 * 16 * 16)
    assert not [one for one in trace.operations if one.kind == "product"]


def test_convolutions_are_counted_by_hand_and_told_apart() -> None:
    x = torch.randn(2, 6, 20, requires_grad=True)
    whole, single = nn.Conv1d(6, 4, 3), nn.Conv1d(6, 6, 3, groups=6)
    with traced(like_gpu=True) as trace:
        whole(x).sum().backward()
        single(x).sum().backward()
    found = [(one.kind, one.flops) for one in trace.operations if "convolution" in one.name]
    dense, depthwise = 2.0 * 2 * 18 * 4 * 6 * 3, 2.0 * 2 * 18 * 6 * 3
    assert found == [
        ("convolution", dense),
        ("convolution", 2 * dense),
        ("depthwise", depthwise),
        ("depthwise", 2 * depthwise),
    ]


@pytest.mark.parametrize("fused", [pytest.param(False, marks=pytest.mark.slow), True])
def test_two_small_batches_tell_the_kernels_of_any_other(fused: bool) -> None:
    small, large, other = (
        steps.Step("smoke", batch, "bf16").trace(like_gpu=True, decomposed=fused)
        for batch in (3, 5, 7)
    )
    found = kernels_of(small, large, (3, 5), fused=fused)
    expected = kernels_of(other, other, (1, 2), fused=fused)
    assert [one.name for one in found] == [one.name for one in expected]
    for one, true in zip(found, expected, strict=True):
        assert one.at(7) == pytest.approx((true.flops[0], true.bytes[0]))


def test_traces_of_different_steps_are_refused() -> None:
    a = torch.randn(3)
    with traced(like_gpu=True) as one:
        a + 1
    with traced(like_gpu=True) as other:
        a * 1
    with pytest.raises(ValueError, match="depend on the batch size"):
        kernels_of(one, other, (1, 2), fused=True)


def test_the_counted_step_is_the_trainers() -> None:
    def weights(step: steps.Step) -> list[Tensor]:
        return [x.detach() for x in step.step.bare.parameters()]

    plain, counted = (steps.Step("smoke", 4) for _ in range(2))
    plain()
    counted.trace(like_gpu=False)
    torch.testing.assert_close(weights(counted), weights(plain), rtol=0, atol=0)


def kernel(kind: str, flops: float, size: float, *, wide: bool = False) -> Kernel:
    return Kernel(kind, kind, (0.0, flops), (0.0, size), wide)


def test_a_kernel_takes_the_longest_of_arithmetic_bytes_and_start() -> None:
    machine = rates.Rates({"product": 100.0, "memory": 10.0}, wide=20.0, least=0.5)
    assert machine.seconds(kernel("product", 200.0, 1.0), 3) == 6.0
    assert machine.seconds(kernel("product", 200.0, 50.0), 3) == 15.0
    assert machine.seconds(kernel("product", 200.0, 1.0, wide=True), 3) == 30.0
    assert machine.seconds(kernel("memory", 0.0, 20.0), 3) == 6.0
    assert machine.seconds(kernel("memory", 0.0, 0.1), 3) == 0.5


def test_a_step_takes_the_time_of_the_gpu_or_of_the_host() -> None:
    gpu, shares = GPUS[-1], rates.Shares(least=1.0, eager=3.0, compiled=2.0, call=5.0, replay=1.0)
    four = [kernel("memory", 0.0, 1.0)] * 4
    seconds = [rates.step_seconds(four, gpu, way, 1, shares) for way in command.WAYS]
    assert seconds == [(4.0, 12.0), (4.0, 13.0), (4.0, 1.0)]


def test_arithmetic_is_at_the_clock_that_a_gpu_keeps_and_bytes_are_not() -> None:
    gpu = find("T4")
    assert gpu is not None
    found, highest = rates.gpu_rates(gpu), rates.gpu_rates(replace(gpu, sustained=1.0))
    for kind in rates.ARITHMETIC:
        assert found.work[kind] == pytest.approx(highest.work[kind] * 900 / 1590, rel=0.01)
    assert found.wide == pytest.approx(highest.wide * 900 / 1590, rel=0.01)
    assert found.work["memory"] == highest.work["memory"]


def test_a_calibration_makes_all_kernels_and_starts_as_slow_as_they_were_measured() -> None:
    gpu, usual = GPUS[-1], rates.Shares(least=0.0)
    kinds = ("memory", "product", "convolution", "depthwise", "attention")
    mixed = [kernel(kind, 1e12, 1e9) for kind in kinds]
    for way in ("eager", "compiled"):
        device, host = rates.step_seconds(mixed, gpu, way, 8, usual)
        found = rates.step_seconds(mixed, gpu, way, 8, usual.scaled(device=3.0, host=2.0))
        assert found == pytest.approx((3.0 * device, 2.0 * host))


def test_rates_are_those_of_the_machine_that_was_timed() -> None:
    true = {"product": 3e9, "memory": 2e9}
    operations = [
        Operation("mm", "product", flops, 1, {0: 200_000}, {}, seconds=flops / true["product"])
        for flops in (1e6, 7e6)
    ]
    operations += [
        Operation(kind, kind, 0.0, 1, {0: size}, {}, seconds=size / true["memory"])
        for kind, size in (("row", 400_000), ("pointwise", 900_000))
    ]
    operations.append(Operation("add", "pointwise", 0.0, 1, {0: 8}, {}, seconds=3e-6))
    found = rates.measured_rates(operations)
    assert found.work["product"] == pytest.approx(true["product"])
    assert found.work["memory"] == pytest.approx(true["memory"])
    assert found.least == 3e-6


def test_gpus_are_known_by_the_names_that_drivers_give() -> None:
    names = {"NVIDIA H200": "H200", "Tesla T4": "T4", "NVIDIA A100-SXM4-80GB": "A100"}
    names |= {"NVIDIA H100 PCIe": "H100 PCIe", "NVIDIA H100 80GB HBM3": "H100"}
    for name, expected in names.items():
        gpu = find(name)
        assert gpu is not None
        assert gpu.name == expected
    assert find("cpu") is None


@pytest.mark.slow
def test_the_command_counts_checks_and_keeps_the_other_part(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "NAMES", ("smoke",))
    monkeypatch.setattr(check, "CALIBRATED_ON", "smoke")
    monkeypatch.setattr(check, "OTHERS", ("smoke",))
    monkeypatch.setattr(command, "table", lambda result: ", ".join(result))
    monkeypatch.setattr(command.published, "compare", list)
    out = tmp_path / "predict.json"
    for options in (["--no-gpus"], ["--no-check"]):
        done = CliRunner().invoke(
            command.main, [*options, "--batch", "4", "--rounds", "1", "--out", str(out)]
        )
        assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    (row,) = result["check"]["recipes"]
    assert row["ratio"] == row["predicted_segments_per_s"] / row["measured_segments_per_s"]
    assert (
        result["counts"]["smoke"]["fused"]["kernels"]
        < result["counts"]["smoke"]["eager"]["kernels"]
    )
    assert len(result["gpus"]) == 4 * 3 * len(command.BATCHES)
    assert all(0 < row["share_of_peak"] < 1 for row in result["gpus"])


def test_the_page_shows_the_tables_of_the_result() -> None:
    result = json.loads(RESULT.read_text())
    page = (ROOT / "docs" / "gpu-speed.md").read_text()
    parts = table.table(result).split("\n\n")
    tables = [part for part in parts if part.startswith("|")]
    assert len(tables) == 5
    for expected in tables:
        assert expected in page


def test_the_page_shows_what_is_assumed_and_what_data_sheets_say() -> None:
    page = (ROOT / "docs" / "gpu-speed.md").read_text()
    values = re.findall(r"\d*\.?\d+", page.partition("| assumed | value |")[2])
    given = rates.ASSUMED
    shown = [given.product, given.convolution, given.attention, given.depthwise, given.memory]
    seconds = [given.least, given.eager, given.compiled, given.call, given.replay]
    # The page has "float32" and "16 bits" beside the values.
    found = [float(value) for value in values if value != "32"]
    assert found[: len(shown)] == shown
    assert found[len(shown) : 10] == [pytest.approx(1e6 * value) for value in seconds]
    for name in command.PREDICTED_GPUS:
        gpu = find(name)
        assert gpu is not None
        assert f"{gpu.bandwidth:,.0f} GB/s" in page
        assert re.search(rf"{gpu.half:.0f}\b[^;]* and\s{gpu.float32:g}", page)


def test_the_method_predicts_the_cpu_within_a_quarter() -> None:
    found = json.loads(RESULT.read_text())["check"]["recipes"]
    assert [row["name"] for row in found] == list(check.OTHERS)
    for row in found:
        assert 0.75 <= row["ratio"] <= 1.25, row["name"]


def test_fused_kernels_move_the_bytes_of_a_real_compilers_within_a_tenth() -> None:
    found = json.loads(RESULT.read_text())["compiler"]
    assert 0.9 <= found["bytes"] <= 1.1
    assert found["bytes"] == found["counted"]["bytes"] / found["inductor"]["bytes"]


def test_what_does_not_fit_into_the_memory_has_no_speed() -> None:
    rows: list[dict[str, Any]] = [
        {"gpu": "T4", "recipe": "boss", "way": way, "batch": batch, "segments_per_s": 1234.0}
        | {"share_of_peak": 0.123, "hours": 0.0456, "fits": batch < 100}
        for way in ("graphs", "compiled")
        for batch in (32, 512)
    ]
    assert "| T4 | graphs | 1,200 (12%) | too large |" in table.ways_table(rows, "boss")
    assert "| boss | 32, graphs | 1,200/s, 2.7 min |" in table.recipes_table(rows)
    assert "| boss | 512, compiled | too large |" in table.recipes_table(rows)


def test_muon_is_counted_in_16_bits_on_any_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    given = steps.recipe("smoke")
    monkeypatch.setattr(
        steps, "recipe", lambda name: replace(given, optim=replace(given.optim, name="muon"))
    )
    with fast_in_bfloat16():
        step = steps.Step("smoke", 2, "bf16")
    trace = step.trace(like_gpu=True)
    found = [one for one in trace.operations if one.name == "baddbmm"]
    assert found
    assert not any(one.wide for one in found)
