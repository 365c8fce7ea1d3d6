"""One measurement of one way to train, made in a process of its own and printed as JSON.

    python -m scripts.bench_train.measurement SPEC

SPEC is the JSON of a `Spec`; `scripts.bench_train` starts these processes. Axis legend: B batch,
T frames, F mel bins.
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
from torch import Tensor

import shardprep
from scripts.bench_train.arithmetic import describe_peak, train_flops
from scripts.bench_train.homework_baseline import (
    RATE,
    Batch,
    HomeworkDataset,
    build_loader,
    cosine_schedule,
    endless,
    read_source,
    train_step,
)
from scripts.bench_train.homework_model import HomeworkModel
from shardprep_trainer.config.command_line import RECIPES, parse_args
from shardprep_trainer.config.fields import Config
from shardprep_trainer.learning.metrics import peak_memory_mib
from shardprep_trainer.model.build import build_model
from shardprep_trainer.run.start import Prepared, prepare
from shardprep_trainer.run.trainer import Trainer

FRAMES = 128
# Blocks of steps, all of the same size: the first blocks warm up, the others are measured.
WARM, MEASURED = 2, 4
# Utterances in an epoch of the homework, whose loader starts its workers again for each epoch.
EPOCH = 56_666
CPU_MATMUL, GPU_MATMUL = 2048, 8192


@dataclass(frozen=True)
class Spec:
    """What to measure.

    Attributes:
        kind: "homework files", "homework shards", "ours", "ours fixed", "peak",
            "flops" or "whole".
        dataset: Data set in the homework's layout.
        shards: The shards made of it.
        batch: Segments B a step.
        block_steps: Steps in a block.
        dim: Width of the model.
        heads: Attention heads.
        head_dim: Width of a head.
        precision: "no", "bf16" or "fp16".
        compile: How our step is compiled: `train.compile`.
        placement: Where our loader keeps the data: `data.placement`.
        workers: Of the homework's DataLoader.
        cpu: Whether to compute on the CPU although there is a GPU.
        frames: Length of the utterance of "whole".
    """

    kind: str
    dataset: str
    shards: str
    batch: int = 32
    block_steps: int = 1
    dim: int = 512
    heads: int = 8
    head_dim: int = 64
    precision: str = "no"
    compile: str = "off"
    placement: str = "auto"
    workers: int = 0
    cpu: bool = True
    frames: int = 7193

    @property
    def device(self) -> torch.device:
        """The device to compute on."""
        return torch.device("cpu" if self.cpu else "cuda")

    @property
    def steps(self) -> int:
        """Steps in all."""
        return (WARM + MEASURED) * self.block_steps


def measure(spec: Spec) -> dict[str, Any]:
    """Measure what a spec says."""
    if spec.kind == "peak":
        size = CPU_MATMUL if spec.cpu else GPU_MATMUL
        return {**describe_peak(spec.device, spec.precision, size), "matmul": size}
    if spec.kind == "flops":
        return {"flops_per_sample": count_flops(spec)}
    if spec.kind == "whole":
        return measure_whole(spec)
    if spec.kind.startswith("ours"):
        return measure_ours(spec)
    return measure_homework(spec)


def homework_boss(spec: Spec) -> HomeworkModel:
    """The homework's boss model from the `conformer` package, with the axes in the right order."""
    shards = shardprep.open_shards(spec.shards)
    sizes = {"dim": spec.dim, "heads": spec.heads, "head_dim": spec.head_dim}
    speakers, n_mels = len(shards.speakers), shards.manifest.n_mels
    return HomeworkModel(n_mels, speakers, **sizes, kind="boss", axis="right")


def measure_homework(spec: Spec) -> dict[str, Any]:
    """Measure the homework's training loop with its own loader or with ours."""
    model = homework_boss(spec).to(spec.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = cosine_schedule(optimizer, spec.block_steps, spec.steps)
    batches = _files(spec) if spec.kind == "homework files" else _segments(spec)
    marks, waited = [], 0.0
    for step in range(spec.steps):
        if step % spec.block_steps == 0:
            marks.append(time.perf_counter())
        asked = time.perf_counter()
        batch = next(batches)
        if step >= WARM * spec.block_steps:
            waited += time.perf_counter() - asked
        train_step(model, batch, optimizer, schedule, spec.device)
    marks.append(time.perf_counter())
    passed = marks[-1] - marks[WARM]
    return _rates(spec, passed, waited / passed)


def _files(spec: Spec) -> Iterator[Batch]:
    files = read_source(Path(spec.dataset)).labelled
    dataset = HomeworkDataset(files * -(-EPOCH // len(files)), FRAMES)
    return endless(build_loader(dataset, spec.batch, spec.workers, shuffle=True))


def _segments(spec: Spec) -> Iterator[Batch]:
    loader = shardprep.SegmentLoader(
        shardprep.open_shards(spec.shards)["train"],
        batch_size=spec.batch,
        segment_frames=FRAMES,
        device=spec.device,
    )
    while True:
        for batch in loader:
            yield batch["mel"].float(), batch["label"]


class TimedTrainer(Trainer):
    """The trainer, which also notes the time at the end of each block of steps."""

    def __init__(self, run: Prepared) -> None:
        super().__init__(run)
        self.marks: list[float] = []

    def _log_training(self) -> None:
        super()._log_training()
        self.marks.append(time.perf_counter())


class FixedBatchTrainer(TimedTrainer):
    """The same trainer, which gets the same batch again and again."""

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        batch = next(iter(self.loader))
        kept = {key: value.to(self.device) for key, value in batch.items() if key != "length"}
        kept["length"] = batch["length"].clone()
        while True:
            yield kept


def our_config(spec: Spec, runs: str) -> Config:
    """The boss recipe with the sizes that a spec gives."""
    options = {
        "name": "bench",
        "data.shards": spec.shards,
        "data.batch_size": spec.batch,
        "data.segment_frames": FRAMES,
        "data.placement": spec.placement,
        "model.dim": spec.dim,
        "model.heads": spec.heads,
        "model.head_dim": spec.head_dim,
        "model.ff_dim": 4 * spec.dim,
        "train.runs": runs,
        "train.total_steps": spec.steps,
        "train.valid_steps": 0,
        "train.save_steps": spec.steps,
        "train.log_steps": spec.block_steps,
        "train.compile": spec.compile,
    }
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return parse_args(["--config", str(RECIPES / "boss.yaml"), *words]).config


def measure_ours(spec: Spec) -> dict[str, Any]:
    """Measure the trainer, with its loader or on one batch; saving at the end does not count."""
    kind = FixedBatchTrainer if spec.kind == "ours fixed" else TimedTrainer
    with tempfile.TemporaryDirectory() as runs:
        trainer = kind(prepare(our_config(spec, runs)))
        try:
            trainer.fit()
        finally:
            trainer.close()
        lines = (Path(runs) / "bench" / "metrics.jsonl").read_text().splitlines()
    assert len(trainer.marks) == WARM + MEASURED
    passed = trainer.marks[-1] - trainer.marks[WARM - 1]
    records = [json.loads(line) for line in lines]
    waiting = [record["waiting"] for record in records if record["event"] == "train"]
    return _rates(spec, passed, sum(waiting[WARM:]) / MEASURED)


def _rates(spec: Spec, passed: float, waiting: float) -> dict[str, Any]:
    return {
        "samples_per_s": MEASURED * spec.block_steps * spec.batch / passed,
        "waiting": waiting,
        "peak_memory_mib": peak_memory_mib(spec.device),
    }


@torch.no_grad()
def measure_whole(spec: Spec) -> dict[str, Any]:
    """Measure the memory that the boss model takes to embed one long utterance in one piece."""
    shards = shardprep.open_shards(spec.shards)
    config = our_config(spec, "runs").model
    n_mels = shards.manifest.n_mels
    model = build_model(config, n_mels, len(shards.speakers)).to(spec.device).eval()
    before, began = peak_memory_mib(spec.device), time.perf_counter()
    scores = model(torch.randn(1, spec.frames, n_mels, device=spec.device))
    assert scores.isfinite().all()
    return {
        "frames": spec.frames,
        "seconds": time.perf_counter() - began,
        "before_mib": before,
        "peak_memory_mib": peak_memory_mib(spec.device),
    }


def count_flops(spec: Spec) -> float:
    """Operations of training for each segment; see `arithmetic.COUNTED`."""
    model = homework_boss(spec)
    return train_flops(model, torch.randn(2, FRAMES, model.prenet.in_features))


@click.command()
@click.argument("spec")
def main(spec: str) -> None:
    """Measure what SPEC says, the JSON of a `Spec`, and print the result."""
    spec = Spec(**json.loads(spec))
    found = measure(spec)
    click.echo(json.dumps({"spec": asdict(spec), "found": found}))


if __name__ == "__main__":
    main()
