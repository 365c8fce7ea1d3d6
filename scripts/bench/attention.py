"""Measure ways to attend with relative positions: which is the fastest on this device.

    python -m scripts.bench.attention [--precision no|bf16]... [--cpu] [--out attention.json]

- products: two matrix products and a softmax, as in the `conformer` package.
- sdpa: `scaled_dot_product_attention` with the relative scores as its bias, a view made by
  `shardprep_trainer.model.blocks.skew`. The trainer uses this way on a GPU.
- flex: FlexAttention, compiled, which reads the relative scores by index and makes no (T, T) bias.

Training is a forward and a backward pass over segments of 128 frames; inference is a forward pass
over whole utterances. FlexAttention sums the gradient of the relative scores with atomic additions
(pytorch/pytorch pull request 137452), each time in another order. So a run that trains with it
cannot be resumed bit for bit. On a CPU it has no gradient at all.

Every way is checked against `products` first. In each round every way is measured once; the results
are medians over the rounds, in milliseconds.

Axis legend: B batch, H heads, T frames, d width of a head.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from scripts.bench_train.arithmetic import DTYPES, wait_for, worthwhile_precisions
from shardprep.bench.machine import machine
from shardprep_trainer.model.blocks import skew

HEADS, HEAD_DIM = 8, 64
Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """The size of the inputs.

    Attributes:
        name: "training" or "inference".
        batch: Utterances B.
        frames: Frames T of each.
    """

    name: str
    batch: int
    frames: int


GPU_CASES = (Case("training", 32, 128), Case("training", 2048, 128), Case("inference", 8, 1337))
CPU_CASES = (Case("training", 32, 128), Case("inference", 1, 1337))


def products(q: Tensor, k: Tensor, v: Tensor, relative: Tensor) -> Tensor:
    """Attend q, k, v (B, H, T, d) with relative (B, H, T, 2T) scores by distance: (B, H, T, d)."""
    scores = q @ k.transpose(-1, -2) + skew(relative, k.shape[2])
    return scores.float().softmax(-1).to(v.dtype) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, relative: Tensor) -> Tensor:
    """The same with PyTorch's fused attention."""
    bias = skew(relative, k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)


def flex(q: Tensor, k: Tensor, v: Tensor, relative: Tensor) -> Tensor:
    """The same with FlexAttention, which is slow unless compiled."""
    last = q.shape[2] - 1

    def add(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + relative[batch, head, query, last - query + key]

    out = flex_attention(q, k, v, score_mod=add, scale=1.0)
    assert isinstance(out, Tensor)
    return out


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """q, k, v (B, H, T, d) and scores by distance (B, H, T, 2T), which a model computes from q."""
    shape = (case.batch, HEADS, case.frames, HEAD_DIM)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    relative = torch.randn(*shape[:3], 2 * case.frames, device=device, dtype=dtype)
    inputs = [q * HEAD_DIM**-0.5, k, v, relative]
    return [x.requires_grad_(case.name == "training") for x in inputs]


def run_once(attend: Attention, inputs: list[Tensor]) -> None:
    """A forward pass, and a backward one if the inputs want gradients."""
    out = attend(*inputs)
    if out.requires_grad:
        torch.autograd.grad(out, inputs, torch.ones_like(out))


def passed_ms(attend: Attention, inputs: list[Tensor], repeats: int) -> float:
    """Milliseconds of one `run_once`, of a number of them."""
    wait_for(inputs[0].device)
    began = time.perf_counter()
    for _ in range(repeats):
        run_once(attend, inputs)
    wait_for(inputs[0].device)
    return (time.perf_counter() - began) / repeats * 1e3


def measure(
    case: Case, ways: dict[str, Attention], precision: str, device: torch.device, *, rounds: int
) -> dict[str, Any]:
    """Measure all ways on the same inputs.

    Returns:
        The case, the milliseconds of each way, and the reasons why other ways failed.
    """
    torch.manual_seed(0)
    inputs = make_inputs(case, DTYPES[precision], device)
    tolerance = 1e-4 if precision == "no" else 5e-2
    expected, failed, works = products(*inputs), {}, {}
    for name, attend in ways.items():
        try:
            torch.testing.assert_close(attend(*inputs), expected, atol=tolerance, rtol=tolerance)
            run_once(attend, inputs)
            works[name] = attend
        except (RuntimeError, NotImplementedError, AssertionError) as error:
            failed[name] = " ".join(str(error).split())[:300]
    repeats = 20 if device.type == "cuda" else 1
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, attend in works.items():
            found[name].append(passed_ms(attend, inputs, repeats))
    times = {name: statistics.median(each) for name, each in found.items()}
    return {**asdict(case), "precision": precision, "milliseconds": times, "failed": failed}


def table(cases: list[dict[str, Any]]) -> str:
    """The measurements as Markdown: milliseconds, and the speed relative to `products`."""
    lines = ["| case | precision | way | ms | relative to products |", "|---|---|---|---|---|"]
    for case in cases:
        about = f"| {case['name']}, {case['batch']} x {case['frames']} | {case['precision']} |"
        times = case["milliseconds"]
        for name, found in times.items():
            ratio = times["products"] / found
            lines.append(f"{about} {name} | {found:.2f} | {ratio:.2f}x |")
        lines += [f"{about} {name} | failed: {why} | |" for name, why in case["failed"].items()]
    return "\n".join(lines)


@click.command(context_settings={"show_default": True})
@click.option(
    "--precision",
    multiple=True,
    type=click.Choice(list(DTYPES)),
    help="[default: both; no alone on a CPU that is slow in bfloat16]",
)
@click.option("--rounds", type=click.IntRange(1), default=9)
@click.option("--flex/--no-flex", "with_flex", default=True, help="Compiling it takes a minute.")
@click.option("--cpu", is_flag=True, help="Do not use a GPU.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="JSON to write.")
def main(
    precision: tuple[str, ...], rounds: int, with_flex: bool, cpu: bool, out: Path | None
) -> None:
    """Measure all ways to attend and print a table."""
    on_gpu = torch.cuda.is_available() and not cpu
    device = torch.device("cuda" if on_gpu else "cpu")
    ways: dict[str, Attention] = {"products": products, "sdpa": sdpa}
    if with_flex:
        ways["flex"] = torch.compile(flex, dynamic=False)
    cases = [
        measure(case, ways, each, device, rounds=rounds)
        for case in (GPU_CASES if on_gpu else CPU_CASES)
        for each in precision or worthwhile_precisions(on_gpu=on_gpu)
    ]
    click.echo(table(cases))
    if out is not None:
        about = machine()
        name = torch.cuda.get_device_name() if on_gpu else about.cpu
        out.parent.mkdir(parents=True, exist_ok=True)
        result = {**asdict(about), "device": name, "rounds": rounds, "cases": cases}
        out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
