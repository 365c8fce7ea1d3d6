"""One measurement of one way to train, made in a process of its own and printed as JSON.

    python -m scripts.bench_train.turns SPEC

SPEC is the JSON of a `Turn`; `scripts.bench_train` starts these. Axis legend: B batch, T frames,
F mel bins.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from shardprep_trainer.config.command_line import RECIPES, parse_args
from shardprep_trainer.config.fields import Config
from shardprep_trainer.learning.metrics import peak_memory_mib
from shardprep_trainer.model.build import build_model
from shardprep_trainer.run.start import Prepared, prepare
from shardprep_trainer.run.trainer import Trainer
from torch import Tensor

import shardprep
from scripts.bench_train.arithmetic import describe_peak, train_flops
from scripts.bench_train.course_baseline import (
    RATE,
    Batch,
    CourseDataset,
    build_loader,
    cosine_schedule,
    endless,
    read_source,
    train_step,
)
from scripts.bench_train.course_model import CourseModel

FRAMES = 128
# Windows of equally many steps: these warm up, those are measured.
WARM, MEASURED = 2, 4
# An epoch of the homework: the course starts its workers anew for each.
EPOCH = 56_666
CPU_MATMUL, GPU_MATMUL = 2048, 8192


@dataclass(frozen=True)
class Turn:
    """What to measure.

    Attributes:
        kind: "course files", "course shards", "ours", "ours fixed", "peak",
            "flops" or "whole".
        dataset: Data set in the homework's layout.
        shards: The shards made of it.
        batch: Segments B a step.
        window: Steps in a window.
        dim: Width of the model.
        heads: Attention heads.
        head_dim: Width of a head.
        precision: "no" or "bf16".
        compile: Whether the model is compiled.
        workers: Of the course's DataLoader.
        cpu: Whether to leave a GPU alone.
        frames: Length of the utterance of "whole".
    """

    kind: str
    dataset: str
    shards: str
    batch: int = 32
    window: int = 1
    dim: int = 512
    heads: int = 8
    head_dim: int = 64
    precision: str = "no"
    compile: bool = False
    workers: int = 0
    cpu: bool = True
    frames: int = 7193

    @property
    def device(self) -> torch.device:
        """Where it is computed."""
        return torch.device("cpu" if self.cpu else "cuda")

    @property
    def steps(self) -> int:
        """Steps in all."""
        return (WARM + MEASURED) * self.window


def measure(turn: Turn) -> dict[str, Any]:
    """Make a measurement."""
    if turn.kind == "peak":
        size = CPU_MATMUL if turn.cpu else GPU_MATMUL
        return {**describe_peak(turn.device, turn.precision, size), "matmul": size}
    if turn.kind == "flops":
        return {"flops_per_sample": count_flops(turn)}
    if turn.kind == "whole":
        return measure_whole(turn)
    if turn.kind.startswith("ours"):
        return measure_ours(turn)
    return measure_course(turn)


def course_boss(turn: Turn) -> CourseModel:
    """The course's boss on the right axis, from the `conformer` package."""
    shards = shardprep.open_shards(turn.shards)
    sizes = {"dim": turn.dim, "heads": turn.heads, "head_dim": turn.head_dim}
    speakers, n_mels = len(shards.speakers), shards.manifest.n_mels
    return CourseModel(n_mels, speakers, **sizes, kind="boss", axis="right")


def measure_course(turn: Turn) -> dict[str, Any]:
    """The course's loop over its own loader, or over ours."""
    model = course_boss(turn).to(turn.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = cosine_schedule(optimizer, turn.window, turn.steps)
    batches = _files(turn) if turn.kind == "course files" else _segments(turn)
    marks, waited = [], 0.0
    for step in range(turn.steps):
        if step % turn.window == 0:
            marks.append(time.perf_counter())
        asked = time.perf_counter()
        batch = next(batches)
        if step >= WARM * turn.window:
            waited += time.perf_counter() - asked
        train_step(model, batch, optimizer, schedule, turn.device)
    marks.append(time.perf_counter())
    passed = marks[-1] - marks[WARM]
    return _rates(turn, passed, waited / passed)


def _files(turn: Turn) -> Iterator[Batch]:
    files = read_source(Path(turn.dataset)).labelled
    dataset = CourseDataset(files * -(-EPOCH // len(files)), FRAMES)
    return endless(build_loader(dataset, turn.batch, turn.workers, shuffle=True))


def _segments(turn: Turn) -> Iterator[Batch]:
    loader = shardprep.SegmentLoader(
        shardprep.open_shards(turn.shards)["train"],
        batch_size=turn.batch,
        segment_frames=FRAMES,
        device=turn.device,
    )
    while True:
        for batch in loader:
            yield batch["mel"].float(), batch["label"]


class TimedTrainer(Trainer):
    """The trainer as it is, with a note of when each logging window was over."""

    def __init__(self, run: Prepared) -> None:
        super().__init__(run)
        self.marks: list[float] = []

    def _log_training(self) -> None:
        super()._log_training()
        self.marks.append(time.perf_counter())


class FixedBatchTrainer(TimedTrainer):
    """The same, fed with one batch for ever."""

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        batch = next(iter(self.loader))
        kept = {key: value.to(self.device) for key, value in batch.items() if key != "length"}
        kept["length"] = batch["length"].clone()
        while True:
            yield kept


def our_config(turn: Turn, runs: str) -> Config:
    """The boss recipe with the sizes of a turn."""
    options = {
        "name": "bench",
        "data.shards": turn.shards,
        "data.batch_size": turn.batch,
        "data.segment_frames": FRAMES,
        "model.dim": turn.dim,
        "model.heads": turn.heads,
        "model.head_dim": turn.head_dim,
        "model.ff_dim": 4 * turn.dim,
        "train.runs": runs,
        "train.total_steps": turn.steps,
        "train.valid_steps": 0,
        "train.save_steps": turn.steps,
        "train.log_steps": turn.window,
    }
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return parse_args(["--config", str(RECIPES / "boss.yaml"), *words]).config


def measure_ours(turn: Turn) -> dict[str, Any]:
    """The real trainer, end to end or on one batch; the last checkpoint is not in the time."""
    kind = FixedBatchTrainer if turn.kind == "ours fixed" else TimedTrainer
    with tempfile.TemporaryDirectory() as runs:
        trainer = kind(prepare(our_config(turn, runs)))
        try:
            trainer.fit()
        finally:
            trainer.close()
        lines = (Path(runs) / "bench" / "metrics.jsonl").read_text().splitlines()
    assert len(trainer.marks) == WARM + MEASURED
    passed = trainer.marks[-1] - trainer.marks[WARM - 1]
    records = [json.loads(line) for line in lines]
    waiting = [record["waiting"] for record in records if record["event"] == "train"]
    return _rates(turn, passed, sum(waiting[WARM:]) / MEASURED)


def _rates(turn: Turn, passed: float, waiting: float) -> dict[str, Any]:
    return {
        "samples_per_s": MEASURED * turn.window * turn.batch / passed,
        "waiting": waiting,
        "peak_memory_mib": peak_memory_mib(turn.device),
    }


@torch.no_grad()
def measure_whole(turn: Turn) -> dict[str, Any]:
    """Memory for one long utterance through boss, heard whole."""
    shards = shardprep.open_shards(turn.shards)
    config = our_config(turn, "runs").model
    n_mels = shards.manifest.n_mels
    model = build_model(config, n_mels, len(shards.speakers)).to(turn.device).eval()
    before, began = peak_memory_mib(turn.device), time.perf_counter()
    scores = model(torch.randn(1, turn.frames, n_mels, device=turn.device))
    assert scores.isfinite().all()
    return {
        "frames": turn.frames,
        "seconds": time.perf_counter() - began,
        "before_mib": before,
        "peak_memory_mib": peak_memory_mib(turn.device),
    }


def count_flops(turn: Turn) -> float:
    """Operations of training, per segment; see `arithmetic.COUNTED`."""
    model = course_boss(turn)
    return train_flops(model, torch.randn(2, FRAMES, model.prenet.in_features))


@click.command()
@click.argument("spec")
def main(spec: str) -> None:
    """Measure what SPEC says, the JSON of a `Turn`, and print the result."""
    turn = Turn(**json.loads(spec))
    found = measure(turn)
    click.echo(json.dumps({"turn": asdict(turn), "found": found}))


if __name__ == "__main__":
    main()
