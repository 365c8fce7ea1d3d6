"""Data parallelism with real processes: their number changes the speed, not the result."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from new_speakers import write_set
from torch import Tensor, nn

import shardprep
from shardprep_trainer.checkpoint.files import load
from shardprep_trainer.config.fields import Config
from shardprep_trainer.model.layers import MaskedBatchNorm1d
from shardprep_trainer.model.sync_norm import SyncedBatchNorm1d, synchronise
from shardprep_trainer.run.data import build_train_loader
from shardprep_trainer.train import main

ConfigFactory = Callable[..., Config]
SCRIPT = str(Path(__file__).resolve().parents[3] / "trainer" / "train.py")
CPU = torch.device("cpu")
TRANSFORMER = {
    "model.encoder": "transformer",
    "model.classifier": "linear",
    "loss.name": "softmax",
    "loss.margin": "null",
    "loss.scale": "null",
}
PLAIN = {
    "model.dropout": 0,
    "train.log_steps": 1,
    "train.valid_steps": 0,
    "train.save_steps": 1000,
}


_TELL = """
import json, math, pathlib, torch

def tell(rank, value):
    pathlib.Path(f"{rank}.json").write_text(json.dumps(value))
"""
# A thread of gloo sometimes aborts a process whose interpreter cleans up.
_END = """
import os, sys
sys.stderr.flush()
os._exit(0)
"""


def run(*command: str, cwd: Path) -> None:
    """Run a program to its end, which must be a good one."""
    done = subprocess.run([sys.executable, "-m", *command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def train(config: Config, processes: int, *options: str) -> None:
    path = Path(config.train.runs).parent / f"{config.name}.yaml"
    path.write_text(config.to_yaml())
    arguments = ["--config", str(path), *options]
    if processes == 1:
        assert main(arguments) == 0
    else:
        launch = ["accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
        run(*launch, SCRIPT, *arguments, cwd=path.parent)


def on_two(program: str, folder: Path) -> list[Any]:
    """Run a program as two processes of `torchrun`; what they `tell(rank, ...)`, by rank."""
    script = folder / "program.py"
    script.write_text(_TELL + program + _END)
    run("torch.distributed.run", "--nproc_per_node", "2", str(script), cwd=folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def losses(config: Config) -> dict[int, float]:
    lines = (config.run / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row["loss"] for row in map(json.loads, lines)}


@pytest.mark.parametrize(
    ("model", "differs"),
    [
        pytest.param(TRANSFORMER, False, marks=pytest.mark.slow),
        ({"train.sync_batchnorm": True}, False),
        pytest.param({}, True, marks=pytest.mark.slow),
    ],
    ids=["transformer", "conformer, BatchNorm synchronised", "conformer"],
)
def test_two_processes_learn_what_one_does_with_batches_twice_the_size(
    make_config: ConfigFactory, model: dict[str, Any], differs: bool
) -> None:
    steps = 8 if differs else 50
    options = {**PLAIN, **model, "train.total_steps": steps}
    pair = make_config(name="pair", **options, **{"data.batch_size": 4})
    single = make_config(name="single", **options, **{"data.batch_size": 8})
    train(pair, 2)
    train(single, 1)
    both, one = losses(pair), losses(single)
    assert list(one) == list(both) == list(range(1, steps + 1))
    gap = max(abs(both[step] - one[step]) for step in one)
    # BatchNorm that sees the batch of its own rank is what makes a difference.
    assert (gap > 1e-4) == differs, gap
    assert one[steps] < one[1] - 0.2 or differs


@pytest.mark.slow
def test_two_processes_that_compile_learn_what_one_does_eagerly(
    make_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    changes = {"train.sync_batchnorm": True, "train.total_steps": 6, "train.average_decay": 0.9}
    options = {**PLAIN, **changes, "optim.lr": 1e-4, "train.accumulate": 2}
    pair = make_config(name="pair", **options, **{"data.batch_size": 2})
    single = make_config(name="single", **options, **{"data.batch_size": 4})
    train(single, 1)
    (tmp_path / "pair.yaml").write_text(pair.to_yaml())
    program = """
from shardprep_trainer.run.start import prepare
from shardprep_trainer.run.trainer import Trainer
from shardprep_trainer.config.command_line import parse_args

trainer = Trainer(prepare(parse_args(["--config", "pair.yaml"]).config))
trainer.fit()
compiled = torch._dynamo.utils.counters
tell(trainer.rank, [compiled["stats"]["unique_graphs"], sum(compiled["graph_break"].values())])
trainer.close()
"""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "AOT_EAGER")
    # The objective and what follows the gradients.
    assert on_two(program, tmp_path) == [[2, 0], [2, 0]]
    assert losses(pair) == pytest.approx(losses(single), abs=1e-4)


@pytest.mark.slow
def test_a_run_changes_from_one_process_to_two_and_back(make_config: ConfigFactory) -> None:
    options = {**PLAIN, "train.sync_batchnorm": True, "train.total_steps": 30}
    whole = make_config(name="whole", **options, **{"data.batch_size": 8})
    train(whole, 1)
    one = make_config(name="parts", **options, **{"data.batch_size": 8})
    two = make_config(name="parts", **options, **{"data.batch_size": 4})
    train(one, 1, "--train.stop_step=10")
    train(two, 2, "--resume", "--train.stop_step=20")
    train(one, 1, "--resume")
    expected, found = losses(whole), losses(one)
    assert list(found) == list(expected) == list(range(1, 31))
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_two_processes_validate_as_one_does(make_config: ConfigFactory, tmp_path: Path) -> None:
    # Weights that hardly move are the same on both, so that every figure must be, too.
    options = {
        **PLAIN,
        **TRANSFORMER,
        "data.shards": write_set(tmp_path / "mixed"),
        "train.total_steps": 2,
        "train.valid_steps": 1,
        "optim.lr": 1e-30,
    }
    pair = make_config(name="pair", **options, **{"data.batch_size": 4})
    single = make_config(name="single", **options, **{"data.batch_size": 8})
    train(pair, 2)
    train(single, 1)
    keys = ("step", "eer", "min_dcf", "trials", "accuracy", "correct", "utterances")
    both, one = (
        [
            [row[key] for key in keys]
            for row in map(json.loads, (config.run / "metrics.jsonl").read_text().splitlines())
            if row["event"] == "valid"
        ]
        for config in (pair, single)
    )
    assert both == one
    assert [row[3] for row in one] == [18, 18]
    models = [load(config.run / "model" / "model.safetensors") for config in (pair, single)]
    assert models[0].best == models[1].best
    assert models[0].thresholds == models[1].thresholds
    assert models[0].calibration == models[1].calibration


@pytest.mark.parametrize("order", ["global", "windowed"])
def test_the_segments_of_a_step_do_not_depend_on_the_number_of_processes(
    make_config: ConfigFactory, order: str
) -> None:
    """Nor on how often that number changed on the way."""

    def loaders(world: int) -> list[shardprep.SegmentLoader]:
        config = make_config(**{"data.batch_size": 8 // world, "data.order": order})
        shards = shardprep.open_shards(config.data.shards)
        return [build_train_loader(config, shards, rank, world, CPU) for rank in range(world)]

    def endless(loader: shardprep.SegmentLoader) -> Iterator[dict[str, Tensor]]:
        while True:
            yield from loader

    def take(ranks: list[shardprep.SegmentLoader], steps: int) -> list[list[bytes]]:
        """The segments of each step, all ranks together, in an order of their own."""
        sources = [endless(loader) for loader in ranks]
        segments = [
            [segment for s in sources for segment in next(s)["mel"].clone()] for _ in range(steps)
        ]
        return [sorted(segment.numpy().tobytes() for segment in step) for step in segments]

    # 24 utterances in steps of 8: over the end of an epoch.
    expected = take(loaders(1), 8)
    assert len({segment for step in expected for segment in step}) > 24
    assert take(loaders(2), 8) == take(loaders(4), 8) == expected
    first = loaders(1)
    found = take(first, 2)
    state = first[0].state_dict()
    for world, steps in ((2, 2), (4, 3), (1, 1)):
        ranks = loaders(world)
        for loader in ranks:
            loader.load_state_dict(state)
        found += take(ranks, steps)
        state = ranks[0].state_dict()
    assert found == expected


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all(
    make_config: ConfigFactory, tmp_path: Path
) -> None:
    config = make_config(**PLAIN, name="pair", **{"data.batch_size": 2, "train.total_steps": 5})
    (tmp_path / "pair.yaml").write_text(config.to_yaml())
    program = """
from shardprep_trainer.run.start import prepare
from shardprep_trainer.run.trainer import Trainer
from shardprep_trainer.config.command_line import parse_args

trainer = Trainer(prepare(parse_args(["--config", "pair.yaml"]).config))
criterion, steps = trainer.train_step.criterion, iter(range(1, 9))

class Faulty(type(criterion)):
    def forward(self, logits, labels):
        loss = criterion(logits, labels)
        return loss + math.inf if next(steps) == 3 and trainer.rank == 1 else loss

trainer.train_step.objective.criterion = Faulty()
trainer.fit()
weights = sum(float(weight.double().abs().sum()) for weight in trainer.train_step.bare.parameters())
states = trainer.train_step.optimizer.state_dict()["state"].values()
step = {float(state["step"]) for state in states}
tell(trainer.rank, [weights, *step, int(trainer.train_step.meter.sums[7])])
trainer.close()
"""
    one, other = on_two(program, tmp_path)
    assert one == other
    assert one[1:] == [4.0, 0]
    rows = [json.loads(line) for line in (config.run / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows] == [0, 0, 1, 0, 0]
    # The loss of step 3 is that of the rank which had one.
    assert all(0 < row["loss"] < 100 for row in rows)


def reference(mels: list[Tensor], masks: list[Tensor]) -> dict[str, list[Any]]:
    """What one process makes of the batches of two; the loss is any function of the output."""
    norm = MaskedBatchNorm1d(3).double()
    x = torch.cat(mels).requires_grad_()
    mask = torch.cat(masks)
    out = norm(x, mask)
    weights = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view_as(out)
    # The ranks' gradients are averaged, so each loss counts half.
    (out.tanh() * weights * mask.unsqueeze(1)).sum().div(2).backward()
    assert x.grad is not None
    assert norm.weight.grad is not None
    return {
        "out": (out.detach() * mask.unsqueeze(1)).tolist(),
        "x": x.grad.mul(2).tolist(),
        "weight": norm.weight.grad.tolist(),
        "running": [norm.running_mean.tolist(), norm.running_var.tolist()],  # type: ignore[union-attr]
        "batches": [int(norm.num_batches_tracked)],  # type: ignore[arg-type]
    }


@pytest.mark.parametrize("sizes", [(2, 3), pytest.param((4, 0), marks=pytest.mark.slow)])
def test_synchronised_batch_norm_is_that_of_all_batches_together(
    sizes: tuple[int, int], tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(5)
    total = sum(sizes)
    x = torch.randn(total, 3, 6, generator=generator, dtype=torch.float64) * 3 + 100
    lengths = torch.tensor([6, 1, 4, 6, 2][:total])
    mask = torch.arange(6) < lengths.unsqueeze(1)
    parts = list(zip(x.split(list(sizes)), mask.split(list(sizes)), strict=True))
    torch.save(parts, tmp_path / "parts.pt")
    program = f"""
import torch.distributed as dist
from shardprep_trainer.model.sync_norm import SyncedBatchNorm1d

dist.init_process_group("gloo")
rank = dist.get_rank()
x, mask = torch.load("parts.pt", weights_only=True)[rank]
norm = SyncedBatchNorm1d(3).double()
x.requires_grad_()
out = norm(x, mask)
weights = torch.linspace(-1, 2, {total * 18}, dtype=torch.float64).view({total}, 3, 6)
mine = weights[: {sizes[0]}] if rank == 0 else weights[{sizes[0]} :]
(out.tanh() * mine * mask.unsqueeze(1)).sum().backward()
dist.all_reduce(norm.weight.grad)
found = {{
    "out": (out.detach() * mask.unsqueeze(1)).tolist(),
    "x": x.grad.tolist(),
    "weight": norm.weight.grad.div(2).tolist(),
    "running": [norm.running_mean.tolist(), norm.running_var.tolist()],
    "batches": [int(norm.num_batches_tracked)],
}}
tell(rank, found)
dist.destroy_process_group()
"""
    ranks = on_two(program, tmp_path)
    expected = reference([a for a, _ in parts], [b for _, b in parts])
    for key, value in expected.items():
        shares = [found[key] for found in ranks]
        each = key in ("out", "x")
        for share in [shares[0] + shares[1]] if each else shares:
            ours, theirs = torch.tensor(share), torch.tensor(value)
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_synchronising_keeps_weights_names_and_the_result_of_one_process() -> None:
    def build() -> nn.Sequential:
        inner = nn.Sequential(nn.BatchNorm1d(4, eps=1e-3, momentum=0.3))
        return nn.Sequential(nn.Linear(6, 6), MaskedBatchNorm1d(4), inner)

    torch.manual_seed(0)
    plain, synced = build(), build()
    synced.load_state_dict(plain.state_dict())
    before = dict(synced.named_parameters())
    synchronise(synced)
    assert [type(layer) for layer in (synced[1], synced[2][0])] == 2 * [SyncedBatchNorm1d]
    assert list(synced.state_dict()) == list(plain.state_dict())
    assert all(before[name] is weight for name, weight in synced.named_parameters())
    x = torch.randn(5, 4, 6)
    torch.testing.assert_close(synced(x), plain(x))
    # As after a pooling layer: (B, C).
    torch.testing.assert_close(synced[2](x[:, :, 0]), plain[2](x[:, :, 0]))
    torch.testing.assert_close(synced.state_dict(), plain.state_dict())
