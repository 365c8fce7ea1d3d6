"""Training: a resumed run equals an uninterrupted one, the best is a copy, each end is clean."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_models import BEST, change_best
from torch import Tensor

import shardprep
from shardprep_trainer.checkpoint.files import load
from shardprep_trainer.checkpoint.state import Best, Checkpoint, to_plain
from shardprep_trainer.config.command_line import parse_args
from shardprep_trainer.config.fields import Config
from shardprep_trainer.errors import CheckpointError, ConfigError, DivergedError
from shardprep_trainer.evaluation.accuracy import Evaluation
from shardprep_trainer.learning.losses import AAMSoftmaxLoss
from shardprep_trainer.learning.step import StepPlan
from shardprep_trainer.run.start import prepare
from shardprep_trainer.run.trainer import Outcome, Trainer

ConfigFactory = Callable[..., Config]
TIMES = ("samples_per_second", "waiting", "network", "peak_memory_mib", "seconds")
TRANSFORMER = {
    "model.encoder": "transformer",
    "model.dropout": 0,
    "model.pooling": "mean",
    "model.classifier": "linear",
    "loss.name": "softmax",
    "loss.margin": "null",
    "loss.scale": "null",
}


def train(config: Config, *, resume: bool = False) -> Outcome:
    trainer = Trainer(prepare(config, resume=resume))
    try:
        return trainer.fit()
    finally:
        trainer.close()


def records(config: Config, event: str | None = None) -> list[dict[str, Any]]:
    """The events of metrics.jsonl, less what depends on the clock."""
    lines = (config.run / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [
        {key: value for key, value in row.items() if key not in TIMES}
        for row in rows
        if event in (None, row["event"])
    ]


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors of a checkpoint, or in nested dicts and lists, in order."""
    if isinstance(value, Checkpoint):
        value = to_plain(value)
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from tensors(inner)


def newest(config: Config) -> Checkpoint:
    return load(max((config.run / "checkpoints").glob("step-*.pt")))


@pytest.mark.parametrize("changes", [{}, {"train.accumulate": 2, "data.batch_size": 2}])
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one_to_the_bit(
    make_config: ConfigFactory, changes: dict[str, Any]
) -> None:
    # 24 utterances in steps of 4: step 5 lies within an epoch and between two log steps.
    uninterrupted = make_config(name="uninterrupted", **changes)
    outcome = train(uninterrupted)
    assert (outcome.step, outcome.finished, outcome.signal) == (12, True, 0)
    stopped = train(make_config(name="parts", **changes, **{"train.stop_step": 5}))
    assert (stopped.step, stopped.finished, stopped.signal) == (5, False, 0)
    torch.rand(7)
    parts = make_config(name="parts", **changes)
    assert train(parts, resume=True) == outcome
    assert len(records(uninterrupted, "train")) == 6
    assert records(parts) == records(uninterrupted)
    one, other = newest(uninterrupted), newest(parts)
    assert len(list(tensors(one))) > 50
    assert all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))
    assert one.training is not None
    assert other.training is not None
    assert one.training.loader == other.training.loader


def test_records_after_the_resumed_checkpoint_are_written_anew(make_config: ConfigFactory) -> None:
    config = make_config(**{"train.save_steps": 4, "train.keep": 3})
    train(config)
    before = records(config)
    for step in (8, 12):
        (config.run / "checkpoints" / f"step-{step:08d}.pt").unlink()
    train(config, resume=True)
    assert records(config) == before


def test_dropout_is_a_function_of_the_step_alone(make_config: ConfigFactory) -> None:
    trainer = Trainer(prepare(make_config()))
    take = trainer.train_step
    take.plan = StepPlan(lambda step: 0.0)
    batch = next(iter(trainer.loader))

    def loss_of(step: int) -> float:
        take.meter.reset()
        take(iter([batch]), step)
        return float(take.meter.sums[0])

    first, other = loss_of(3), loss_of(4)
    torch.manual_seed(9)
    assert loss_of(3) == first != other


def test_best_is_a_copy_of_the_weights_at_the_best_step(
    make_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([2, 5, 5, 1])

    def fake(*args: object, **options: object) -> Evaluation:
        return Evaluation(torch.zeros(6).numpy(), next(scores), 6, 1.0)

    monkeypatch.setattr("shardprep_trainer.run.validation.evaluate", fake)
    config = make_config(
        **{"train.valid_steps": 3, "train.save_steps": 3, "train.keep": 9, "train.log_steps": 5}
    )
    outcome = train(config)
    # Of equals the later is kept.
    assert (outcome.best_step, outcome.best_accuracy) == (9, 5 / 6)
    folder = config.run / "checkpoints"
    best = load(config.run / BEST)
    then, last = (load(folder / n) for n in ("step-00000009.pt", "step-00000012.pt"))
    assert best.best == Best(5 / 6, 9)
    assert best.weights.keys() == then.weights.keys() == last.weights.keys()
    for name, weight in best.weights.items():
        assert torch.equal(weight, then.weights[name])
        # A weight that is 0 throughout, as that of a bias may be, need not have moved.
        if weight.dtype.is_floating_point and weight.any():
            assert not torch.equal(weight, last.weights[name])
    assert best.training is None


def test_validation_counts_every_utterance_and_always_comes_at_the_end(
    make_config: ConfigFactory,
) -> None:
    config = make_config(**{"train.valid_steps": 5})
    train(config)
    found = records(config, "valid")
    assert [row["step"] for row in found] == [5, 10, 12]
    assert all(row["utterances"] == 6 for row in found)
    assert all(row["accuracy"] == row["correct"] / 6 for row in found)


def test_two_micro_batches_are_one_batch_of_twice_the_size(make_config: ConfigFactory) -> None:
    options = {**TRANSFORMER, "train.total_steps": 6, "train.log_steps": 1}
    halves = make_config(**options, name="a", **{"train.accumulate": 2, "data.batch_size": 4})
    whole = make_config(**options, name="b", **{"data.batch_size": 8})
    train(halves)
    train(whole)
    for a, b in zip(records(halves, "train"), records(whole, "train"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert a["lr"] == b["lr"]


def test_the_learning_rate_follows_the_schedule_once_a_step(make_config: ConfigFactory) -> None:
    config = make_config(**{"train.log_steps": 1, "train.accumulate": 2, "data.batch_size": 2})
    train(config)
    rates = [row["lr"] for row in records(config, "train")]
    rise = [config.optim.lr * (step + 1) / 4 for step in range(4)]
    fall = [config.optim.lr * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    assert rates == pytest.approx(rise + fall)


def test_the_gradient_is_clipped_to_the_norm_asked_for(make_config: ConfigFactory) -> None:
    trainer = Trainer(prepare(make_config(**{"optim.clip_norm": 0.01})))
    norms: list[float] = []
    step = trainer.train_step.optimizer.step

    def look(*args: object) -> None:
        total = [p.grad.norm() for p in trainer.train_step.bare.parameters() if p.grad is not None]
        norms.append(float(torch.stack(total).norm()))
        step()

    trainer.train_step.optimizer.step = look
    trainer.train_step(iter(trainer.loader), 0)
    assert norms == pytest.approx([0.01], rel=1e-3)
    assert float(trainer.train_step.meter.sums[3]) > 0.02


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(
    make_config: ConfigFactory, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(**{"train.save_steps": 100})
    trainer = Trainer(prepare(config))
    fetch, calls = trainer.train_step.throughput.fetch, iter(range(100))

    def interrupted(batches: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
        if next(calls) == 6:
            signal.raise_signal(number)
        return fetch(batches)

    monkeypatch.setattr(trainer.train_step.throughput, "fetch", interrupted)
    outcome = trainer.fit()
    trainer.close()
    assert (outcome.step, outcome.finished, outcome.signal) == (7, False, number)
    assert newest(config).step == 7


def make_faulty(trainer: Trainer, bad: set[int]) -> None:
    """Make the losses of some steps, counted from 1, NaN."""
    criterion, steps = trainer.train_step.criterion, iter(range(trainer.step + 1, 100))

    class Faulty(torch.nn.Module):
        def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
            loss: Tensor = criterion(logits, labels)
            return loss * math.nan if next(steps) in bad else loss

    trainer.train_step.objective.criterion = Faulty()


@pytest.mark.parametrize("log_steps", [1, 4, 100])
def test_losses_that_are_not_finite_stop_the_run_and_name_the_step(
    make_config: ConfigFactory, log_steps: int
) -> None:
    config = make_config(
        **{
            "train.log_steps": log_steps,
            "train.save_steps": 2,
            "train.valid_steps": 0,
            "train.max_skipped": 2,
        }
    )
    trainer = Trainer(prepare(config))
    # Steps 1 and 2 are as many as may be.
    make_faulty(trainer, {1, 2, 5, 6, 7})
    told = r"^step 7: .*max_skipped allows 2 .*step-00000006\.pt is from before.*--optim"
    with pytest.raises(DivergedError, match=told):
        trainer.fit()
    assert newest(config).step == 6


def test_skipped_steps_are_recorded_and_leave_no_trace_in_the_means(
    make_config: ConfigFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(prepare(config := make_config(**{"train.valid_steps": 0})))
    make_faulty(trainer, {3, 4, 6})
    trainer.fit()
    trainer.close()
    rows = records(config, "train")
    assert [row["skipped"] for row in rows] == [0, 2, 1, 0, 0, 0]
    assert [row["loss"] is None for row in rows] == [False, True] + 4 * [False]
    assert [row["accuracy"] is None for row in rows] == [row["loss"] is None for row in rows]
    assert [row["grad_norm"] is None for row in rows] == [row["loss"] is None for row in rows]
    err = capsys.readouterr().err
    assert err.count("note: ") == 2
    assert "note: 2 step(s) up to step 4 skipped" in err


@pytest.mark.parametrize("cut", [5, 6])
def test_steps_skipped_in_a_row_are_counted_over_a_resumption(
    make_config: ConfigFactory, cut: int
) -> None:
    # Steps are logged at 2, 4, 6: the cut falls between two of these, and at one.
    limits = {"train.max_skipped": 3, "train.save_steps": 100, "train.valid_steps": 0}
    bad = {4, 5, 6, 7}
    trainer = Trainer(prepare(make_config(**limits, **{"train.stop_step": cut})))
    make_faulty(trainer, bad)
    trainer.fit()
    trainer.close()
    trainer = Trainer(prepare(make_config(**limits), resume=True))
    make_faulty(trainer, bad)
    with pytest.raises(DivergedError, match="^step 7: "):
        trainer.fit()


def test_an_existing_run_is_not_overwritten(make_config: ConfigFactory) -> None:
    config = make_config()
    train(config)
    before = {path: path.stat().st_mtime_ns for path in config.run.rglob("*")}
    with pytest.raises(ConfigError, match=r"step-00000012\.pt.*--resume.*--name NAME"):
        prepare(config)
    assert {path: path.stat().st_mtime_ns for path in config.run.rglob("*")} == before


def test_there_must_be_something_to_resume_from(make_config: ConfigFactory) -> None:
    config = make_config()
    with pytest.raises(CheckpointError, match="no checkpoint to resume from.*without --resume"):
        prepare(config, resume=True)
    assert not config.run.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"model.dim": 64},
        {"loss.margin": 0.3},
        {"train.seed": 1},
        {"data.segment_frames": 32},
        {"data.batch_size": 8},
        {"train.accumulate": 2},
    ],
)
def test_what_makes_it_another_run_is_refused_by_name(
    make_config: ConfigFactory, change: dict[str, Any]
) -> None:
    train(make_config(**{"train.stop_step": 2}))
    (field,) = change
    name = "data.batch_size" if field == "train.accumulate" else field
    with pytest.raises(ConfigError, match=rf"^{name}: found .* began with"):
        prepare(make_config(**change), resume=True)


def test_what_may_change_is_noted(
    make_config: ConfigFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    train(make_config(**{"train.stop_step": 2}))
    config = make_config(**{"optim.lr": 1e-4, "data.batch_size": 2, "train.accumulate": 2})
    outcome = train(config, resume=True)
    assert outcome.finished
    assert "note: optim.lr was 0.003 and is now 0.0001\n" in capsys.readouterr().err


def test_another_data_set_is_refused(
    make_config: ConfigFactory, make_dataset: Callable[..., Path], shards: Path
) -> None:
    train(make_config(**{"train.stop_step": 2}))
    shutil.rmtree(shards)
    other = make_dataset("Other", speakers=3, utterances=10, seed=9)
    shardprep.build_shards(other, shards, shardprep.BuildOptions(val_fraction=0.2, workers=1))
    with pytest.raises(ConfigError, match="fingerprint .* began on"):
        prepare(make_config(), resume=True)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [lambda path: os.truncate(path, 9000), flip, Path.touch])
def test_a_damaged_checkpoint_falls_back_on_the_one_before_to_the_bit(
    make_config: ConfigFactory,
    damage: Callable[[Path], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    uninterrupted = make_config(name="uninterrupted")
    train(uninterrupted)
    parts = make_config(name="parts")
    train(parts)
    last = parts.run / "checkpoints" / "step-00000012.pt"
    if damage is Path.touch:
        last.unlink()
    damage(last)
    capsys.readouterr()
    assert train(parts, resume=True).finished
    err = capsys.readouterr().err
    assert "WARNING: " in err
    assert f"{last}: damaged (" in err
    assert "; continues from step 6" in err
    assert records(parts) == records(uninterrupted)
    for name in (BEST, "checkpoints/step-00000012.pt"):
        found, expected = (load(c.run / name) for c in (parts, uninterrupted))
        assert found.step == expected.step
        assert list(map(torch.equal, tensors(found), tensors(expected))).count(False) == 0


def test_without_an_undamaged_checkpoint_the_remedy_is_told(make_config: ConfigFactory) -> None:
    config = make_config()
    train(config)
    for path in (config.run / "checkpoints").glob("step-*.pt"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"all of the 2 .* --train\.start_from .*model"):
        prepare(config, resume=True)


def test_another_format_is_no_damage(make_config: ConfigFactory) -> None:
    config = make_config()
    train(config)
    torch.save({"format": 1}, config.run / "checkpoints" / "step-00000012.pt")
    with pytest.raises(CheckpointError, match=r"step-00000012\.pt: checkpoint format 1 found"):
        prepare(config, resume=True)


def test_data_that_does_not_allow_the_run_is_refused_with_the_remedy(
    make_config: ConfigFactory, make_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    missing = make_config(**{"data.shards": tmp_path / "none"})
    with pytest.raises(ConfigError, match="shardprep build Dataset/ .*none"):
        prepare(missing)
    with pytest.raises(ConfigError, match="data.batch_size: found 25 .* only 24 utterances"):
        prepare(make_config(**{"data.batch_size": 25}))
    options = shardprep.BuildOptions(val_fraction=0.0, workers=1)
    shardprep.build_shards(make_dataset("Other"), tmp_path / "noval", options)
    with pytest.raises(ConfigError, match=r"a val split.*--train\.valid_steps 0"):
        prepare(make_config(**{"data.shards": tmp_path / "noval"}))
    plain = make_config(**{"data.shards": tmp_path / "noval", "train.valid_steps": 0})
    assert train(plain).best_accuracy is None


def test_launch_flags_that_the_device_cannot_follow_are_refused(
    make_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ConfigError, match="--mixed_precision: found fp16"):
        prepare(make_config())


@pytest.mark.parametrize(("capability", "slow"), [("AVX2", True), ("AVX512", False)])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_bf16_on_a_cpu_that_is_slow_in_it_is_warned_of(
    make_config: ConfigFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    capability: str,
    slow: bool,
    precision: str,
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    config = make_config()
    prepare(config)
    warned = "WARNING: this CPU has no AVX-512" in capsys.readouterr().err
    assert warned == (slow and precision == "bf16")
    metrics = config.run / "metrics.jsonl"
    assert warned == (metrics.exists() and '"warning"' in metrics.read_text())


def test_processes_that_do_not_meet_are_refused(
    make_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    config = make_config()
    with pytest.raises(ConfigError, match="started 2 processes, but accelerate sees 1"):
        prepare(config)
    assert not config.run.exists()


def test_mixed_precision_trains_and_keeps_weights_and_losses_in_float32(
    make_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    config = make_config(**{"train.log_steps": 1, "train.total_steps": 8})
    seen: set[torch.dtype] = set()
    trainer = Trainer(prepare(config))
    criterion = trainer.train_step.criterion

    class Watched(torch.nn.Module):
        def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
            seen.add(logits.dtype)
            loss: Tensor = criterion(logits, labels)
            return loss

    trainer.train_step.objective.criterion = Watched()
    trainer.fit()
    trainer.close()
    assert seen == {torch.float32}
    dtypes = {value.dtype for value in tensors(newest(config).weights)}
    assert dtypes == {torch.float32, torch.int64}
    assert trainer.accelerator.mixed_precision == "bf16"


def test_the_run_folder_holds_what_it_should(make_config: ConfigFactory) -> None:
    config = make_config(**{"train.trackers": "[tensorboard]"})
    train(config)
    names = sorted(path.name for path in config.run.iterdir())
    assert names[:2] == ["checkpoints", "config.yaml"]
    assert names[2].startswith("events.out.tfevents")
    assert names[3:] == ["metrics.jsonl", "model"]
    assert (config.run / "config.yaml").read_text() == config.to_yaml()


@pytest.mark.gpu
def test_nothing_waits_for_the_device_between_log_steps(
    make_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    trainer = Trainer(prepare(make_config()))
    batches = iter(trainer.loader)
    trainer.train_step(batches, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 4):
            trainer.train_step(batches, step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        trainer.close()


@pytest.mark.parametrize(
    "changes",
    [{"data.placement": "device"}, {"data.prefetch": 0}, {"data.prefetch": 7}],
    ids=str,
)
def test_where_the_data_lie_and_who_fetches_them_changes_no_number(
    make_config: ConfigFactory, changes: dict[str, Any]
) -> None:
    plain = make_config(name="plain", **{"data.placement": "host"})
    other = make_config(name="other", **changes)
    train(plain)
    train(other)
    assert records(plain) == records(other)
    ours, theirs = (list(tensors(newest(config).weights)) for config in (plain, other))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_run_in_windowed_order_resumes_exactly(make_config: ConfigFactory) -> None:
    windowed = {"data.order": "windowed", "data.lanes": 4, "data.window_shards": 1}
    uninterrupted, parts = (
        make_config(name=name, **windowed) for name in ("uninterrupted", "parts")
    )
    train(uninterrupted)
    train(make_config(name="parts", **windowed, **{"train.stop_step": 5}))
    train(parts, resume=True)
    assert records(parts, "train")[-1] == records(uninterrupted, "train")[-1]
    assert records(uninterrupted, "train") != records(_global(make_config), "train")


def _global(make_config: ConfigFactory) -> Config:
    config = make_config(name="global")
    train(config)
    return config


def test_lanes_that_do_not_divide_the_batch_are_refused(make_config: ConfigFactory) -> None:
    with pytest.raises(ConfigError, match=r"data\.lanes: found 8.* divide the 4 segments"):
        train(make_config(**{"data.order": "windowed"}))


def test_the_order_of_a_run_cannot_be_changed(make_config: ConfigFactory) -> None:
    train(make_config(**{"train.stop_step": 5}))
    with pytest.raises(ConfigError, match=r"data\.order: found windowed"):
        train(make_config(**{"data.order": "windowed", "data.lanes": 4}), resume=True)


STRONG_RECIPE: dict[str, Any] = {
    "model.layers": 2,
    "model.pooling": "attentive_statistics",
    "model.center": True,
    "model.subsampling": 2,
    "model.stem_channels": 4,
    "model.concat": True,
    "model.embedding_dim": 24,
    "augment.reverb": 0.5,
    "augment.channel": 1.0,
    "augment.babble": 0.5,
    "augment.noise": 0.5,
    "augment.time_masks": 1,
    "augment.freq_masks": 1,
    "loss.margin_growth": 0.5,
    "optim.name": "muon",
    "train.average_decay": 0.9,
}


def test_a_run_with_all_that_best_has_resumes_to_the_bit(make_config: ConfigFactory) -> None:
    uninterrupted = make_config(name="uninterrupted", **STRONG_RECIPE)
    outcome = train(uninterrupted)
    train(make_config(name="parts", **STRONG_RECIPE, **{"train.stop_step": 5}))
    parts = make_config(name="parts", **STRONG_RECIPE)
    assert train(parts, resume=True) == outcome
    assert records(parts) == records(uninterrupted)
    one, other = newest(uninterrupted), newest(parts)
    assert all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_may_go_on_with_another_weight_decay(
    make_config: ConfigFactory, optimizer: str
) -> None:
    train(make_config(**{"train.stop_step": 5, "optim.name": optimizer}))
    changed = make_config(**{"optim.name": optimizer, "optim.weight_decay": 0.25})
    trainer = Trainer(prepare(changed, resume=True))
    groups = trainer.train_step.optimizer.param_groups
    assert len(groups) == (2 if optimizer == "muon" else 1)
    assert all(group["weight_decay"] == 0.25 for group in groups)
    trainer.close()


def test_a_run_begun_before_there_was_a_choice_of_optimiser_continues(
    make_config: ConfigFactory,
) -> None:
    config = make_config(**{"train.stop_step": 5})
    train(config)
    file = config.run / "checkpoints" / "step-00000005.pt"
    saved = torch.load(file, weights_only=True)
    del saved["config"]["optim"]["name"]
    torch.save(saved, file)
    with pytest.raises(ConfigError, match=r"optim\.name: found muon, .* began with adamw"):
        prepare(make_config(**{"optim.name": "muon"}), resume=True)
    assert train(make_config(), resume=True).finished


def test_the_average_is_validated_and_saved_for_prediction(make_config: ConfigFactory) -> None:
    config = make_config(**{"train.average_decay": 0.9, "train.valid_steps": 12})
    trainer = Trainer(prepare(config))
    trainer.fit()
    assert trainer.train_step.plan.average is not None
    saved = newest(config)
    averaged = trainer.train_step.predictor.state_dict()
    raw = trainer.train_step.bare.state_dict()
    assert all(torch.equal(saved.weights[key], averaged[key]) for key in averaged)
    assert saved.training is not None
    trained = saved.training.raw or {}
    assert all(torch.equal(trained[key], raw[key]) for key in raw)
    assert not torch.equal(averaged["encoder.stem.weight"], raw["encoder.stem.weight"])
    best = load(config.run / BEST).weights
    assert all(torch.equal(best[key], averaged[key]) for key in averaged)
    trainer.close()


def test_the_margin_grows_from_step_to_step(make_config: ConfigFactory) -> None:
    trainer = Trainer(prepare(make_config(**{"loss.margin_growth": 0.5, "loss.margin": 0.3})))
    margins = []
    take = trainer.train_step._inputs

    def spy(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor]:
        margins.append(float(trainer.train_step.margin))
        return take(batch)

    trainer.train_step._inputs = spy  # type: ignore[method-assign]
    trainer.fit()
    trainer.close()
    assert margins == pytest.approx([0.3 * min(1, step / 6) for step in range(12)])


def test_fine_tuning_begins_with_the_weights_of_another_run(make_config: ConfigFactory) -> None:
    first = make_config(name="first")
    train(first)
    last = max((first.run / "checkpoints").glob("step-*.pt"))
    tuned = make_config(
        name="tuned",
        **{"train.start_from": last, "loss.margin": 0.5, "data.segment_frames": 96},
    )
    trainer = Trainer(prepare(tuned))
    expected = load(last).weights
    assert all(torch.equal(v, expected[k]) for k, v in trainer.train_step.bare.state_dict().items())
    trainer.fit()
    trainer.close()
    assert not torch.equal(
        newest(tuned).weights["encoder.stem.weight"], expected["encoder.stem.weight"]
    )


def test_best_lm_begins_with_the_weights_of_best_and_takes_its_steps(
    shards: Path, tmp_path: Path
) -> None:
    steps = {"total_steps": 4, "valid_steps": 2, "save_steps": 2, "log_steps": 1}
    narrow = {"dim": 16, "heads": 2, "head_dim": 8, "ff_dim": 32, "layers": 1, "stem_channels": 4}
    options = [f"--train.{key}={value}" for key, value in steps.items()]
    options += [f"--model.{key}={value}" for key, value in narrow.items()]
    options += [f"--data.shards={shards}", f"--train.runs={tmp_path}", "--train.trackers=[]"]
    options += ["--data.batch_size=4"]
    first = parse_args(["--config", "best", *options, "--data.segment_frames=48"]).config
    train(first)
    # The runs lie elsewhere here than the recipe says.
    options += [f"--train.start_from={tmp_path / 'best'}", "--data.segment_frames=96"]
    tuned = parse_args(["--config", "best-lm", *options]).config
    trainer = Trainer(prepare(tuned))
    expected = load(first.run / BEST).weights
    step = trainer.train_step
    for model in (step.bare, step.predictor):
        assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())
    assert isinstance(step.criterion, AAMSoftmaxLoss)
    trainer.fit()
    assert float(step.criterion.margin) == 0.5
    trainer.close()
    tuned_weights = newest(tuned).weights
    assert all(weight.isfinite().all() for weight in tuned_weights.values())
    moved = {name for name, was in expected.items() if not torch.equal(tuned_weights[name], was)}
    # All but counts of batches; the statistics of BatchNorm follow the longer segments.
    assert {name for name in expected if "running" in name or "weight" in name} <= moved


def test_fine_tuning_on_other_speakers_keeps_the_rows_of_those_it_knows(
    make_config: ConfigFactory, make_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    first = make_config(name="first")
    train(first)
    last = max((first.run / "checkpoints").glob("step-*.pt"))
    source = make_dataset("Other", speakers=4)
    for name in ("metadata.json", "mapping.json"):
        # One speaker has another name, and one is new.
        text = (source / name).read_text().replace("id00001", "zoe")
        (source / name).write_text(text)
    shardprep.build_shards(source, tmp_path / "other", shardprep.BuildOptions(workers=1))
    tuned = make_config(
        name="tuned", **{"train.start_from": last, "data.shards": tmp_path / "other"}
    )
    run = prepare(tuned)
    before, found = load(last), run.train_step.bare.state_dict()
    names = run.speakers.names
    assert {"zoe", "id00003"} < set(names) != set(before.speakers)
    for name, weight in found.items():
        if not name.startswith("classifier."):
            assert torch.equal(weight, before.weights[name])
    for name in (key for key in found if key.startswith("classifier.")):
        for row, speaker in enumerate(names):
            same = speaker in before.speakers and torch.equal(
                found[name][row], before.weights[name][before.speakers.index(speaker)]
            )
            assert same == (speaker in before.speakers)
    Trainer(run).close()


def test_shards_of_other_features_are_no_start_for_a_model(
    make_config: ConfigFactory, make_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    first = make_config(name="first")
    train(first)
    model = first.run / "model"
    change_best(first.run, features=shardprep.FeatureRecipe().to_features())
    # Nothing is known of the features of these shards.
    Trainer(prepare(make_config(name="unknown", **{"train.start_from": model}))).close()
    shards = tmp_path / "known"
    recipe = shardprep.FeatureRecipe(hop_length=200)
    shardprep.build_shards(
        make_dataset("Other"), shards, shardprep.BuildOptions(workers=1, recipe=recipe)
    )
    other = make_config(name="other", **{"train.start_from": model, "data.shards": shards})
    with pytest.raises(ConfigError, match=r"hop_length 200, not 160.*--features-from .*model"):
        prepare(other)


def test_weights_of_another_model_are_refused(make_config: ConfigFactory) -> None:
    first = make_config(name="first")
    train(first)
    last = max((first.run / "checkpoints").glob("step-*.pt"))
    for place, folder in ((last, first.run), (first.run / "model", first.run / "model")):
        with pytest.raises(CheckpointError, match=f"the weights in it do not .*--config {folder}$"):
            prepare(make_config(name="other", **{"train.start_from": place, "model.layers": 2}))
    with pytest.raises(CheckpointError, match="there is no such checkpoint"):
        prepare(make_config(name="none", **{"train.start_from": "nowhere.pt"}))
