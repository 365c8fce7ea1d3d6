"""A training step: skipped without a trace where something is not finite, however it is decided."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from shardprep_trainer.checkpoint.files import load
from shardprep_trainer.config.fields import Config, OptimConfig
from shardprep_trainer.learning.build import build_optimizer
from shardprep_trainer.model.build import build_model
from shardprep_trainer.model.model import CosineClassifier, SpeakerNetwork
from shardprep_trainer.processes.meeting import join_processes
from shardprep_trainer.run.start import prepare
from shardprep_trainer.run.trainer import Trainer

ConfigFactory = Callable[..., Config]
Batch = dict[str, Tensor]


@pytest.fixture(params=["branch", "fused", "muon"])
def make_trainer(
    request: pytest.FixtureRequest, make_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Trainer]:
    """Trainers whose steps are skipped by a branch on the host, or by a fused optimiser."""

    def build(config: OptimConfig, model: SpeakerNetwork, device: torch.device) -> Optimizer:
        if request.param == "muon":
            return build_optimizer(replace(config, name="muon"), model, device)
        decay, fused = config.weight_decay, request.param == "fused"
        return torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=decay, fused=fused)

    monkeypatch.setattr("shardprep_trainer.learning.build.build_optimizer", build)
    return lambda **changes: Trainer(prepare(make_config(**changes)))


class Faulty(nn.Module):
    """A criterion of which some calls, counted from 0, fail."""

    def __init__(self, criterion: nn.Module, how: str, bad: set[int]) -> None:
        super().__init__()
        self.criterion, self.how, self.bad, self.calls = criterion, how, bad, 0

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        fails = self.calls in self.bad
        self.calls += 1
        if fails and self.how == "gradient":
            logits.register_hook(lambda gradient: gradient * math.inf)
        loss: Tensor = self.criterion(logits, labels)
        if fails and self.how == "nan":
            return loss * math.nan
        # The gradient of an infinite loss is finite here.
        return loss + math.inf if fails and self.how == "inf" else loss


def state(trainer: Trainer) -> dict[str, Tensor]:
    """All that a step may change: weights, running statistics, moments and their step counts."""
    moments = trainer.train_step.optimizer.state_dict()["state"]
    flat = {f"{i}.{key}": x for i, values in moments.items() for key, x in values.items()}
    return {key: x.clone() for key, x in {**trainer.train_step.bare.state_dict(), **flat}.items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def take(trainer: Trainer, steps: list[int], batches: list[list[Batch]]) -> None:
    for step in steps:
        trainer.train_step(iter(batches[step]), step)


def some_batches(trainer: Trainer, steps: int) -> list[list[Batch]]:
    source = trainer._batches()
    parts = trainer.config.train.accumulate
    return [
        [{key: x.clone() for key, x in next(source).items()} for _ in range(parts)]
        for _ in range(steps)
    ]


@pytest.mark.parametrize("how", ["nan", "inf", "gradient"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_skipped_step_is_as_if_it_had_never_been(
    make_trainer: Callable[..., Trainer], how: str, accumulate: int
) -> None:
    changes = {"train.accumulate": accumulate, "data.batch_size": 4 // accumulate}
    faulty, plain = (make_trainer(name=name, **changes) for name in ("faulty", "plain"))
    batches = some_batches(plain, 5)
    criterion = faulty.train_step.criterion
    # The first step, before there are moments; then one amid others, its last micro-batch only.
    bad = {0, 3 * accumulate - 1}
    faulty.train_step.objective.criterion = Faulty(criterion, how, bad)
    take(faulty, [0, 1, 2, 3, 4], batches)
    take(plain, [1, 3, 4], batches)
    assert equal(state(faulty), state(plain))
    assert faulty.train_step.meter.sums[4:7].tolist() == [3, 2, 0]
    take(plain, [2], batches)
    assert not equal(state(faulty), state(plain))


def test_features_that_are_not_finite_do_not_reach_the_running_statistics(
    make_trainer: Callable[..., Trainer],
) -> None:
    trainer = make_trainer()
    batches = some_batches(trainer, 2)
    take(trainer, [0], batches)
    before = state(trainer)
    batches[1][0]["mel"][1, 3] = math.nan
    take(trainer, [1], batches)
    assert any("running_var" in key for key in before)
    assert equal(state(trainer), before)


class Operations(TorchDispatchMode):
    """Names of the operations run while entered, each with the dtypes of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, set[torch.dtype]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        dtypes = {value.dtype for value in args if isinstance(value, Tensor)}
        self.seen.append((func.overloadpacket.__name__, dtypes))
        return func(*args, **(kwargs or {}))

    def dtypes(self, *names: str) -> set[torch.dtype]:
        return {dtype for name, dtypes in self.seen for dtype in dtypes if name in names}

    def count(self, *names: str) -> int:
        return sum(name in names for name, _ in self.seen)


RICH = {
    "optim.name": "muon",
    "model.dropout": 0.1,
    "augment.channel": 0.5,
    "augment.babble": 0.5,
    "augment.noise": 0.5,
    "augment.time_masks": 2,
    "augment.freq_masks": 2,
    "loss.margin_growth": 0.5,
    "train.average_decay": 0.9,
    "train.max_skipped": 2,
}


@pytest.mark.parametrize("encoder", ["conformer", "transformer"])
@pytest.mark.parametrize("bad", [False, True])
def test_a_step_reads_nothing_back_from_the_device(
    make_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch, encoder: str, bad: bool
) -> None:
    """As far as a CPU can tell: `item`, `bool`, `nonzero` and the like are one of these."""
    # These look at what lies on the host even where the model is on a GPU, or not at all then.
    monkeypatch.setattr("shardprep_trainer.model.cpu_kernels.applies_to", lambda x: False)
    monkeypatch.setattr("shardprep_trainer.learning.losses._check", lambda logits, labels: None)
    monkeypatch.setattr(
        "shardprep_trainer.learning.step.model_inputs",
        lambda batch, device, padded: (batch["mel"], batch["length"]),
    )
    trainer = Trainer(prepare(make_config(**RICH, **{"model.encoder": encoder})))
    criterion = trainer.train_step.criterion
    trainer.train_step.objective.criterion = Faulty(criterion, "nan", {1, 2} if bad else set())
    batches = some_batches(trainer, 4)
    take(trainer, [0], batches)
    with Operations() as operations:
        take(trainer, [1, 2, 3], batches)
    assert operations.count("_foreach_norm", "linalg_vector_norm") >= 3
    assert not operations.count("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "unique")
    assert float(trainer.train_step.meter.sums[5]) == 2 * bad
    with Operations() as operations:
        assert trainer.train_step.meter.sums[4] > 0
    assert operations.count("_local_scalar_dense") == 1


@pytest.mark.gpu
def test_a_skipped_step_waits_for_the_device_as_little_as_another(
    make_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    trainer = Trainer(prepare(make_config(**RICH)))
    trainer.train_step.objective.criterion = Faulty(trainer.train_step.criterion, "nan", {1, 2})
    batches = some_batches(trainer, 5)
    take(trainer, [0], batches)
    before = state(trainer)
    torch.cuda.set_sync_debug_mode("error")
    try:
        take(trainer, [1, 2], batches)
        torch.cuda.set_sync_debug_mode("default")
        assert equal(state(trainer), before)
        torch.cuda.set_sync_debug_mode("error")
        take(trainer, [3, 4], batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        trainer.close()
    assert trainer.train_step.meter.sums[4:7].tolist() == [3, 2, 0]


@pytest.mark.parametrize("encoder", ["conformer", "transformer"])
def test_under_bf16_only_products_are_narrow(
    make_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch, encoder: str
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    trainer = Trainer(prepare(make_config(**{"model.encoder": encoder})))
    head = trainer.train_step.bare.classifier
    assert isinstance(head, CosineClassifier)
    seen: list[tuple[Tensor, Tensor]] = []
    head.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    batches = some_batches(trainer, 1)
    with Operations() as operations:
        take(trainer, [0], batches)
    wide = {torch.float32}
    assert torch.bfloat16 in operations.dtypes("mm", "addmm", "bmm")
    softmaxes = ("_softmax", "_safe_softmax", "_log_softmax", "_softmax_backward_data")
    assert operations.dtypes(*softmaxes) == wide
    assert operations.count("_log_softmax") == 1
    assert operations.dtypes("_foreach_norm", "linalg_vector_norm", "native_layer_norm") == wide
    # The cosines are right to float32, though bfloat16 would err by 4e-3.
    ((embedding, cosines),) = seen
    assert (embedding.dtype, cosines.dtype) == (torch.float32, torch.float32)
    directions = nn.functional.normalize(weight_before(trainer, batches), dim=1)
    exact = nn.functional.normalize(embedding.double(), dim=1) @ directions.T
    assert (cosines - exact).abs().max() < 1e-6


def weight_before(trainer: Trainer, batches: list[list[Batch]]) -> Tensor:
    """The directions of the speakers, float64, as they were before the first step."""
    torch.manual_seed(trainer.config.train.seed)
    model = build_model(trainer.config.model, 40, 3)
    assert isinstance(model.classifier, CosineClassifier)
    return model.classifier.weight.detach().double()


@pytest.mark.parametrize("masked", [False, True])
def test_fused_attention_in_bf16_sums_in_float32(masked: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 2, 300, 16, generator=generator).bfloat16() for _ in range(3))
    bias = torch.randn(2, 2, 300, 300, generator=generator).bfloat16() if masked else None
    found = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    wide = (None if bias is None else bias.double(),)
    exact = nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), *wide)
    # Rounding of the weights, and once of the result; sums of 300 in bfloat16 would lose 1e-1.
    assert (found.double() - exact).abs().max() < 2**-8 * exact.abs().max()


def half(scale: float) -> Callable[[Config], Accelerator]:
    """As on a GPU with `--mixed_precision fp16`, which accelerate does not offer on a CPU."""

    def join(*args: Any, **options: Any) -> Accelerator:
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = join_processes(*args, **options)
        accelerator.state._mixed_precision = "fp16"
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        return accelerator

    return join


def test_the_steps_that_the_scaler_skips_are_counted_and_harm_nothing(
    make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardprep_trainer.run.start.join_processes", half(2.0**30))
    trainer = make_trainer(**{"train.total_steps": 30})
    batches = some_batches(trainer, 30)
    before = state(trainer)
    take(trainer, [0], batches)
    after = state(trainer)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    take(trainer, list(range(1, 30)), batches)
    scaler = trainer.accelerator.scaler
    assert scaler is not None
    taken, skipped = trainer.train_step.meter.sums[4:6].tolist()
    # Every skipped step halves the scale; it grows after 2,000 good ones.
    assert scaler.get_scale() == 2.0 ** (30 - skipped)
    assert taken > 0
    assert skipped > 3
    counts = {float(x) for key, x in state(trainer).items() if key.endswith(".step")}
    assert counts == {taken}


def test_the_scaler_goes_on_where_a_stopped_run_left_it(
    make_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardprep_trainer.run.start.join_processes", half(2.0**22))
    options = {"train.total_steps": 16, "train.valid_steps": 0, "train.log_steps": 4}

    def finish(config: Config, *, resume: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
        trainer = Trainer(prepare(config, resume=resume))
        trainer.fit()
        trainer.close()
        assert trainer.accelerator.scaler is not None
        return state(trainer), trainer.accelerator.scaler.state_dict()

    uninterrupted, scaler = finish(make_config(name="uninterrupted", **options))
    finish(make_config(name="parts", **options, **{"train.stop_step": 2}))
    saved = load(make_config(name="parts").run / "checkpoints" / "step-00000002.pt")
    assert saved.training is not None
    scale = (saved.training.scaler or {})["scale"]
    assert 2.0 ** (22 - 2) <= scale < 2.0**22
    monkeypatch.setattr("shardprep_trainer.run.start.join_processes", half(1.0))
    resumed, continued = finish(make_config(name="parts", **options), resume=True)
    assert equal(resumed, uninterrupted)
    assert continued == scaler


@pytest.mark.gpu
def test_fp16_on_a_gpu_counts_saves_and_restores_its_scaler(
    make_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    steps = {"train.total_steps": 40, "train.valid_steps": 0, "train.log_steps": 40}
    trainer = Trainer(prepare(make_config(**steps, **{"train.stop_step": 20})))
    assert trainer.accelerator.scaler is not None
    trainer.accelerator.scaler.update(2.0**30)
    trainer.fit()
    skipped = float(trainer.train_step.meter.sums[5])
    assert trainer.accelerator.scaler.get_scale() == 2.0 ** (30 - skipped)
    trainer.close()
    trainer = Trainer(prepare(make_config(**steps), resume=True))
    assert trainer.accelerator.scaler is not None
    assert trainer.accelerator.scaler.get_scale() == 2.0 ** (30 - skipped)
    trainer.close()
