"""A compiled step: whole, as good as the eager one, compiled once, and done without if need be."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from shardprep_trainer.checkpoint.files import load
from shardprep_trainer.config.command_line import RECIPES, parse_args
from shardprep_trainer.config.fields import Config
from shardprep_trainer.errors import ConfigError
from shardprep_trainer.learning.augment import Augment
from shardprep_trainer.learning.build import build_loss
from shardprep_trainer.learning.compilation import Compilation, choose, failure
from shardprep_trainer.learning.objective import Objective
from shardprep_trainer.model.build import build_model
from shardprep_trainer.run.start import prepare
from shardprep_trainer.run.trainer import Trainer

ConfigFactory = Callable[..., Config]
# What changes from step to step, and what draws random numbers.
RICH = {
    "model.dropout": 0.1,
    "augment.channel": 0.5,
    "augment.noise": 0.5,
    "loss.margin_growth": 0.5,
    "train.average_decay": 0.9,
    "train.valid_steps": 0,
    "train.log_steps": 1,
}
TRAINED = sorted(path.stem for path in RECIPES.glob("*.yaml"))


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def small_objective(recipe: str) -> Objective:
    """The objective of a recipe without dropout, narrow and with one block."""
    sizes = ["layers=1", "dim=32", "ff_dim=64", "heads=2", "head_dim=16", "dropout=0"]
    words = [f"--model.{size}" for size in sizes]
    path = str(RECIPES / f"{recipe}.yaml")
    config = parse_args(["--config", path, "--data.shards", "shards", *words]).config
    # An encoder that a recipe names by its class has sizes of its own.
    narrow = {"layers": 1, "dim": 32, "heads": 2, "dropout": 0.0}
    if "blocks" in config.model.encoder_options:
        narrow["blocks"] = [1] * len(config.model.encoder_options["blocks"])
    options = {
        name: narrow.get(name, value) for name, value in config.model.encoder_options.items()
    }
    torch.manual_seed(0)
    model = build_model(replace(config.model, encoder_options=options), 40, 7)
    augment = Augment(**asdict(config.augment))
    return Objective(model, build_loss(config.loss), augment).train()


def check_whole(recipe: str, dtype: torch.dtype, *, masked: bool, backend: str) -> None:
    """Compare loss, sums, gradients and running statistics of eager and compiled."""
    lengths = torch.tensor([64, 40, 64, 1]) if masked else None
    torch.manual_seed(2)
    exact = dtype == torch.float64
    mel = torch.randn(4, 64, 40, dtype=dtype if exact else torch.float32)
    inputs = mel, lengths, torch.tensor([0, 3, 6, 3])
    found = []
    for compiled in (False, True):
        objective = small_objective(recipe).to(mel.dtype)
        if compiled:
            objective.run = Compilation("default", backend).objective(objective.compute)
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype, enabled=dtype.itemsize == 2):
            loss, sums = objective(*inputs)
        weights = list(objective.parameters())
        gradients = torch.autograd.grad(loss, weights)
        found.append([loss.detach(), sums, *objective.buffers(), *gradients])
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    # Compilers round products in another order. That turns some values of ReLU from zero to not
    # zero: few in float32, many in 16 bits, more where many convolutions follow each other.
    deep = recipe in ("best", "best-lm", "trunk")
    of_loss, near = {
        torch.float64: (1e-9, 1e-6),
        torch.float32: (1e-5, 0.1 if deep else 1e-4),
    }.get(dtype, (5e-3, 0.25) if deep else (1e-3, 0.1))
    torch.testing.assert_close(*(values[0] for values in found), rtol=of_loss, atol=0)
    for eager, other in zip(*found, strict=True):
        assert (other - eager).double().norm() <= near * eager.double().norm() + near


@pytest.mark.parametrize(
    ("recipe", "dtype", "masked"),
    [("boss", torch.float64, False), ("best", torch.bfloat16, True)],
)
def test_augmentation_model_and_loss_compile_whole_to_the_same_loss(
    recipe: str, dtype: torch.dtype, masked: bool
) -> None:
    check_whole(recipe, dtype, masked=masked, backend="eager")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "masked"),
    [
        (torch.float64, False),
        (torch.float32, False),
        (torch.bfloat16, True),
        (torch.float16, True),
    ],
)
@pytest.mark.parametrize("recipe", TRAINED)
def test_every_recipe_compiles_whole_in_every_precision(
    recipe: str, dtype: torch.dtype, masked: bool
) -> None:
    check_whole(recipe, dtype, masked=masked, backend="aot_eager")


def train(config: Config, **options: bool) -> Trainer:
    trainer = Trainer(prepare(config, **options))
    try:
        trainer.fit()
    finally:
        trainer.close()
    return trainer


def losses(config: Config) -> list[float]:
    lines = (config.run / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if record["event"] == "train"]


def weights(config: Config) -> dict[str, Tensor]:
    return load(max((config.run / "checkpoints").glob("step-*.pt"))).weights


def test_short_utterances_and_growing_margins_compile_nothing_anew(
    make_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of 24 utterances some are shorter than a segment; three epochs of 6 steps.
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    config = make_config(**RICH, **{"train.total_steps": 18, "optim.name": "muon"})
    trainer = Trainer(prepare(config))
    frames = trainer.shards["train"].frames
    assert (frames < config.data.segment_frames).any()
    assert (frames >= config.data.segment_frames).any()
    compiled: list[int] = []
    step = type(trainer.train_step).__call__

    def count(take: Any, batches: Any, number: int) -> None:
        step(take, batches, number)
        compiled.append(counters["stats"]["unique_graphs"])

    monkeypatch.setattr(type(trainer.train_step), "__call__", count)
    trainer.fit()
    trainer.close()
    # The objective, Muon's iteration, and what counts the step.
    assert compiled == [3] * 18
    assert not counters["graph_break"]


def test_a_compiled_run_has_the_losses_of_an_eager_one_and_resumes_to_the_bit(
    make_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {**RICH, "model.dropout": 0, "optim.lr": 1e-4, "train.total_steps": 6}
    eager = make_config(**changes, name="eager", **{"train.compile": "off"})
    train(eager)
    # As `train.compile default`, with a backend that needs no C++ compiler.
    monkeypatch.setattr(
        "shardprep_trainer.run.start.choose",
        lambda *given, **options: Compilation("default", "eager"),
    )
    whole, parts = (make_config(**changes, name=name) for name in ("whole", "parts"))
    train(whole)
    train(make_config(**changes, name="parts", **{"train.stop_step": 3}))
    train(parts, resume=True)
    assert losses(whole) == pytest.approx(losses(eager), rel=1e-5)
    assert losses(parts) == losses(whole)
    one, other = weights(whole), weights(parts)
    assert all(torch.equal(one[key], other[key]) for key in one)


def fails_at_once(graph: Any, inputs: Any) -> Any:
    raise OSError("no C++ compiler\nand a long report")


def fails_backwards(graph: Any, inputs: Any) -> Any:
    from torch._dynamo.backends.common import aot_autograd

    backend = aot_autograd(fw_compiler=lambda graph, inputs: graph, bw_compiler=fails_at_once)
    return backend(graph, inputs)


@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd")
@pytest.mark.parametrize("backend", [fails_at_once, fails_backwards])
def test_a_compiler_that_fails_leaves_a_note_and_an_eager_run(
    make_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch, backend: Any
) -> None:
    changes = {**RICH, "train.total_steps": 3}
    eager, failed = (make_config(**changes, name=name) for name in ("eager", "failed"))
    train(eager)
    monkeypatch.setattr(
        "shardprep_trainer.run.start.choose",
        lambda *given, **options: Compilation("default", backend),
    )
    train(failed)
    assert losses(failed) == losses(eager)
    one, other = weights(eager), weights(failed)
    assert all(torch.equal(one[key], other[key]) for key in one)
    lines = (failed.run / "metrics.jsonl").read_text().splitlines()
    (warning,) = (r["text"] for r in map(json.loads, lines) if r["event"] == "warning")
    assert warning.startswith("the step is not compiled, since the compiler failed: ")
    assert "--train.compile off" in warning


def test_a_change_that_cannot_be_compiled_is_made_as_it_is() -> None:
    notes: list[str] = []
    total = torch.zeros(())

    def add(x: Tensor) -> None:
        total.add_(x)

    change = Compilation("default", fails_at_once).function(add, notes.append)  # type: ignore[arg-type]
    change(torch.tensor(2.0))
    change(torch.tensor(3.0))
    assert (float(total), len(notes)) == (5.0, 1)


def a_run(device: str, backend: str = "NO", mode: str = "default") -> Any:
    """Stands for an accelerator on a device, told of a compiler or not."""

    class Plugin:
        pass

    plugin = Plugin()
    plugin.__dict__.update(backend=accelerate_backend(backend), mode=mode)
    accelerator = Plugin()
    accelerator.__dict__.update(device=torch.device(device), state=Plugin())
    accelerator.state.__dict__.update(dynamo_plugin=plugin)  # type: ignore[attr-defined]
    return accelerator


def accelerate_backend(name: str) -> Any:
    from accelerate.utils import DynamoBackend

    return DynamoBackend(name)


@pytest.mark.parametrize(
    ("device", "asked", "frames", "steps", "way"),
    [
        ("cpu", "auto", 4096, 70_000, "off"),
        ("cpu", "default", 4096, 10, "default"),
        ("cuda", "auto", 4096, 70_000, "graphs"),
        ("cuda", "auto", 2**17, 70_000, "default"),
        ("cuda", "auto", 4096, 100, "off"),
        ("cuda", "off", 4096, 70_000, "off"),
        ("cuda", "graphs", 2**17, 10, "graphs"),
    ],
)
def test_the_way_follows_device_batch_and_length(
    device: str, asked: str, frames: int, steps: int, way: str
) -> None:
    assert choose(asked, a_run(device), frames=frames, steps=steps).way == way


def test_what_accelerate_was_told_holds_and_two_compilers_are_refused() -> None:
    told = a_run("cpu", "EAGER")
    assert choose("auto", told, frames=1, steps=1) == Compilation("default", "eager")
    graphs = a_run("cuda", "INDUCTOR", "reduce-overhead")
    assert choose("auto", graphs, frames=1, steps=1).way == "graphs"
    tuned = choose("auto", a_run("cpu", "INDUCTOR", "max-autotune"), frames=1, steps=1)
    assert tuned == Compilation("default", mode="max-autotune")
    # On a GPU this mode records CUDA graphs, too.
    tuned = choose("auto", a_run("cuda", "INDUCTOR", "max-autotune"), frames=1, steps=1)
    assert tuned == Compilation("graphs", mode="max-autotune")
    with pytest.raises(
        ConfigError, match=r"train\.compile: found default, .*_backend eager; leave"
    ):
        choose("default", told, frames=1, steps=1)
    with pytest.raises(ConfigError, match=r"train\.compile: found graphs on a cpu, allowed is"):
        choose("graphs", a_run("cpu"), frames=1, steps=1)


def test_what_failed_is_said_in_one_line_also_where_the_error_begins_with_the_compiler() -> None:
    error = RuntimeError("backend='inductor' raised:\n\nInvalidCxxCompiler: no g++\n\nSet TORCH")
    assert failure(error) == (
        "the step is not compiled, since the compiler failed: RuntimeError: backend='inductor' "
        "raised: InvalidCxxCompiler: no g++; --train.compile off does without it"
    )
