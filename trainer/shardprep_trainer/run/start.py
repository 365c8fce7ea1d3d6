"""The start of a run: everything that it needs, opened, built and restored by all processes alike.

Processes meet first. Each then opens the data and finds the checkpoint to continue from; all make
sure that they agree on both. Only then are the model and the rest built, and set to the step that
the checkpoint holds.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from shardprep import OpenShards, SegmentLoader, publish
from shardprep_trainer.checkpoint.files import CheckpointFolder, Newest, load
from shardprep_trainer.checkpoint.find import find_checkpoint
from shardprep_trainer.checkpoint.state import Best
from shardprep_trainer.checkpoint.training import restore_training
from shardprep_trainer.checkpoint.weights import (
    check_features,
    load_weights,
    start_from,
)
from shardprep_trainer.config.fields import Config, flatten
from shardprep_trainer.learning.build import build_train_step
from shardprep_trainer.learning.compilation import choose
from shardprep_trainer.learning.step import TrainStep
from shardprep_trainer.model import cpu_kernels as cpu
from shardprep_trainer.model.build import build_model
from shardprep_trainer.model.model import SpeakerNetwork
from shardprep_trainer.model.precision import allow_tensor_float32
from shardprep_trainer.model.sync_norm import synchronise
from shardprep_trainer.processes.agreement import check_alike, exchange, together
from shardprep_trainer.processes.launch import launcher_identity
from shardprep_trainer.processes.meeting import join_processes, meeting_place
from shardprep_trainer.processes.watchdog import Watchdog
from shardprep_trainer.run.claim import RunClaim, jobs_of
from shardprep_trainer.run.data import batch_of_each, build_train_loader, open_data
from shardprep_trainer.run.journal import Journal
from shardprep_trainer.run.resume import (
    Changes,
    check_same_data,
    check_same_run,
    choose_checkpoint,
)
from shardprep_trainer.run.speakers import Speakers, speakers_of
from shardprep_trainer.run.validation import Validation, plan_validation

# What may differ from machine to machine: where things lie.
_PER_MACHINE = (
    "data.shards",
    "data.cache_folder",
    "data.cache_gb",
    "train.runs",
    "train.start_from",
)


@dataclass(frozen=True)
class Found:
    """What the disks of this machine hold for a run."""

    shards: OpenShards
    """The data, open."""
    checkpoints: CheckpointFolder
    """Of the run."""
    newest: Newest | None
    """The checkpoint to continue from, if any."""
    launchers: list[str]
    """Identities of the launchers of all machines, to be saved in the checkpoints."""


@dataclass(frozen=True)
class Prepared:
    """A run that is ready for its next step."""

    config: Config
    accelerator: Accelerator
    """Has prepared the model and the optimiser."""
    shards: OpenShards
    speakers: Speakers
    """Those of the head."""
    validation: Validation | None
    """What is measured at each validation; None without."""
    loader: SegmentLoader
    """This process's part of the training split, at its position."""
    train_step: TrainStep
    """Takes a step; holds model, optimiser, criterion and average."""
    checkpoints: CheckpointFolder
    claim: RunClaim
    """Keeps other runs out of the run folder, until it is released."""
    launchers: list[str]
    """Identities of the launchers of all machines, to be saved in the checkpoints."""
    journal: Journal
    watchdog: Watchdog
    global_batch: int
    """Segments of a step over all processes."""
    step: int
    """Steps done."""
    best: Best


def prepare(config: Config, *, resume: bool = False) -> Prepared:
    """Join the other processes, claim the run folder, and prepare the run together.

    Args:
        config: A checked configuration.
        resume: Continue from the newest checkpoint, or from the one before it if that is damaged.
            A run that its launcher starts anew continues in any case.

    Raises:
        ConfigError: The data, the run folder or the launch does not allow this run.
        CheckpointError: There is no checkpoint to continue from, or none that is undamaged.
        ShardprepError: The shards cannot be read.
        ElsewhereError: Another process has met one of these.
    """
    train = config.train
    accelerator = join_processes(
        config.run, trackers=train.trackers, hang_seconds=train.hang_seconds
    )
    claim = RunClaim(config.run, main=accelerator.is_main_process)
    try:
        return _prepare(config, accelerator, claim, resume=resume)
    except BaseException:
        claim.release()
        raise


def _prepare(
    config: Config, accelerator: Accelerator, claim: RunClaim, *, resume: bool
) -> Prepared:
    train = config.train
    rank, world_size = accelerator.process_index, accelerator.num_processes
    device = accelerator.device
    if device.type == "cpu":
        cpu.keep_memory()
    elif train.tf32:
        allow_tensor_float32()
    found = find_start(config, claim, resume=resume)
    loader = together(lambda: build_train_loader(config, found.shards, rank, world_size, device))
    global_batch = batch_of_each(config.data, world_size) * world_size * train.accumulate
    speakers = speakers_of(found.shards)
    validation = None
    if train.valid_steps:
        wanted = train.valid_trials
        validation = together(lambda: plan_validation(found.shards, speakers, wanted))
    model, new_speakers = _build_model(config, found.shards, speakers.names)
    data, split = config.data, found.shards["train"]
    frames = batch_of_each(data, world_size) * data.segment_frames
    compilation = together(
        lambda: choose(train.compile, accelerator, frames=frames, steps=train.total_steps)
    )
    short = bool((split.frames < data.segment_frames).any())
    train_step = build_train_step(config, model, accelerator, compilation, short=short)
    step, best, changes = 0, Best(), Changes()
    if (newest := found.newest) is not None:
        changes = together(
            lambda: _restore(newest, config, found.shards, train_step, loader, global_batch)
        )
        step, best = newest.checkpoint.step, newest.checkpoint.best
    if accelerator.is_main_process:
        found.checkpoints.sweep()
        with publish(config.run / "config.yaml") as file:
            file.write(config.to_yaml().encode())
    run = Prepared(
        config=config,
        accelerator=accelerator,
        shards=found.shards,
        speakers=speakers,
        validation=validation,
        loader=loader,
        train_step=train_step,
        checkpoints=found.checkpoints,
        claim=claim,
        launchers=found.launchers,
        journal=Journal(accelerator, config.run, step=step, total=train.total_steps),
        watchdog=Watchdog(
            train.hang_seconds, rank=rank, world_size=world_size, store=meeting_place()
        ),
        global_batch=global_batch,
        step=step,
        best=best,
    )
    _introduce(run, newest, changes)
    if new_speakers and newest is None:
        run.journal.progress.say(
            f"note: {config.train.start_from} does not know {len(new_speakers):,} of the "
            f"{len(speakers.names):,} speakers; the head learns them anew"
        )
    return run


def find_start(config: Config, claim: RunClaim, *, resume: bool) -> Found:
    """Open the data, claim the run folder, and find the checkpoint to continue from, all together.

    Args:
        config: Of the run.
        claim: On the run folder; taken before anything there is read.
        resume: As in `prepare`.

    Raises:
        ConfigError: The data or the run folder does not allow this run, or the machines do not
            agree on it.
        CheckpointError: There is no checkpoint to continue from, or none that is undamaged.
        ShardprepError: The shards cannot be read.
        ElsewhereError: Another process has met one of these.
    """
    launchers = sorted({name for _, name in exchange(launcher_identity(os.environ)) if name})

    def find() -> Found:
        shards = open_data(config.data, validated=config.train.valid_steps > 0)
        claim.take([*launchers, *jobs_of(os.environ)])
        folder = CheckpointFolder(config.run, config.train.keep)
        newest = choose_checkpoint(folder, config, resume=resume, launchers=launchers)
        return Found(shards, folder, newest, launchers)

    found = together(find)
    _check_machines(config, found)
    return found


def _check_machines(config: Config, found: Found) -> None:
    """Make sure that all machines are about to do the same run, from the same step.

    Raises:
        ConfigError: They have other options, other data or another checkpoint.
    """
    fields = {key: x for key, x in flatten(config.to_dict()).items() if key not in _PER_MACHINE}
    check_alike(fields, "give every machine the same options")
    check_alike(
        {"the fingerprint of data.shards": found.shards.fingerprint},
        "all machines must read the same set",
    )
    newest = found.newest.checkpoint.file.name if found.newest else "none"
    check_alike(
        {"the newest undamaged checkpoint": newest},
        f"{config.run} must be the same folder on all machines, on a disk that they share, or "
        "hold the same checkpoints on each",
    )


def _build_model(
    config: Config, shards: OpenShards, speakers: tuple[str, ...]
) -> tuple[SpeakerNetwork, tuple[str, ...]]:
    """The model with its first weights: random ones, or those of `train.start_from`.

    Returns:
        The model, and the speakers whom `train.start_from` does not know.
    """
    torch.manual_seed(config.train.seed)
    # The command line has made sure that the user named the encoder.
    named = (config.model.encoder,)
    model = build_model(config.model, shards.n_mels, len(speakers), named)
    new: tuple[str, ...] = ()
    if (path := config.train.start_from) is not None:

        def begin() -> tuple[str, ...]:
            checkpoint = load(find_checkpoint(Path(path)))
            check_features(checkpoint, shards.features, shards.where)
            return start_from(model, checkpoint, speakers)

        new = together(begin)
    if config.train.sync_batchnorm:
        synchronise(model)
    return model, new


def _restore(
    newest: Newest,
    config: Config,
    shards: OpenShards,
    train_step: TrainStep,
    loader: SegmentLoader,
    global_batch: int,
) -> Changes:
    """Continue from a checkpoint; returns what differs from it and may."""
    saved, training, accelerator = newest.checkpoint, newest.training, train_step.accelerator
    check_same_data(shards, saved, config.data.where)
    changes = check_same_run(
        config,
        saved.config,
        training,
        global_batch=global_batch,
        precision=str(accelerator.mixed_precision),
        processes=accelerator.num_processes,
    )
    load_weights(train_step.predictor, saved.weights, saved.file)
    if train_step.plan.average is not None:
        load_weights(train_step.bare, training.raw or {}, saved.file)
    restore_training(accelerator, train_step.optimizer, loader, training, saved.file)
    # The optimiser has taken the weight decay of the checkpoint; every step sets the rate itself.
    for group in train_step.optimizer.param_groups:
        group["weight_decay"] = config.optim.weight_decay
    if accelerator.is_main_process:
        # The sums are those of all ranks: they count once.
        train_step.meter.restore(training.meter)
    return changes


def _introduce(run: Prepared, newest: Newest | None, changes: Changes) -> None:
    """Say what the run is, and what differs from the checkpoint that it continues from."""
    config, device, precision = (
        run.config,
        run.accelerator.device,
        run.accelerator.mixed_precision,
    )
    say = run.journal.progress.say
    way = run.train_step.compilation.way
    compiled = "" if way == "off" else f"compiled ({way}), "
    weights = sum(weight.numel() for weight in run.train_step.bare.parameters())
    say(
        f"{config.name}: {weights:,} weights, {len(run.speakers.names):,} speakers, "
        f"{len(run.shards['train']):,} utterances to train on; "
        f"{run.accelerator.num_processes} process(es) on "
        f"{device.type}, precision {precision}, {compiled}"
        f"{run.global_batch:,} segments a step, data on the {run.loader.placement}; "
        + (f"continues after step {run.step:,}" if run.step else f"run folder {config.run}")
    )
    if run.validation is not None and run.validation.by_eer:
        say(
            f"note: {run.validation.strangers:,} speakers of val are not in train; the equal error "
            "rate of trials among them chooses the best model"
        )
    if device.type == "cpu" and precision == "bf16" and cpu.is_slow_in_bfloat16():
        run.journal.warn(run.step, cpu.SLOW_BFLOAT16)
    if way != "off":
        say("note: the first step compiles, which takes a minute or more")
    for error in newest.unusable if newest else ():
        say(f"WARNING: {error}; continues from step {run.step:,}")
    for key, (before, now) in changes.items():
        before, now = ("null" if value is None else value for value in (before, now))
        say(f"note: {key} was {before} and is now {now}")
