"""The training loop: steps, logging, validation, checkpoints, and a clean end.

A step is an optimiser step. Everything random in it is a function of (seed, step, rank) and
everything read a function of (seed, position), so a resumed run continues like one that was never
interrupted. Axis legend: B batch, T frames, F mel bins, S speakers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shardprep import CorruptShardError, publish
from shardprep_trainer.checkpoint.files import Newest, load
from shardprep_trainer.checkpoint.find import find_checkpoint
from shardprep_trainer.checkpoint.state import Best, Checkpoint, Training
from shardprep_trainer.checkpoint.training import gather_training, restore_training
from shardprep_trainer.checkpoint.weights import load_weights, start_from
from shardprep_trainer.config.fields import Config
from shardprep_trainer.errors import CheckpointError, DivergedError
from shardprep_trainer.evaluation.accuracy import evaluate
from shardprep_trainer.learning.average import AveragedModel
from shardprep_trainer.learning.build import (
    batch_of_each,
    build_eval_loader,
    build_loss,
    build_optimizer,
    build_plan,
    build_train_loader,
)
from shardprep_trainer.learning.metrics import Window, combine, peak_memory_mib
from shardprep_trainer.learning.step import TrainStep
from shardprep_trainer.model import cpu_kernels as cpu
from shardprep_trainer.model.build import build_model
from shardprep_trainer.model.precision import allow_tensor_float32
from shardprep_trainer.model.sync_norm import share_buffers, synchronise
from shardprep_trainer.processes.agreement import together
from shardprep_trainer.processes.interrupt import StopSignals
from shardprep_trainer.processes.meeting import join_processes, meeting_place
from shardprep_trainer.processes.watchdog import (
    COMPUTING,
    READING,
    SAVING,
    VALIDATING,
    WAITING,
    Watchdog,
)
from shardprep_trainer.run.journal import Journal
from shardprep_trainer.run.outcome import Outcome
from shardprep_trainer.run.preflight import (
    Changes,
    check_same_data,
    check_same_run,
)
from shardprep_trainer.run.start import find_start


class Trainer:
    """A run: builds everything from a configuration, then trains.

    In training, BatchNorm sees the batch of its own rank, or with `train.sync_batchnorm` those of
    all; rank 0's running statistics are the ones that are validated and saved, on every rank.

    Args:
        config: A checked configuration.
        resume: Continue from the newest checkpoint of the run folder, or from the one before it
            if that is damaged. A launcher that starts the run anew does so in any case.

    Raises:
        ConfigError: The data or the run folder does not allow this run, or the machines of the
            launch do not agree.
        ElsewhereError: Another process has met one of these errors.
        CheckpointError: There is no checkpoint to continue from, or none that is whole.
        ShardprepError: The shards cannot be read.
    """

    def __init__(self, config: Config, *, resume: bool = False) -> None:
        self.config = config
        train = config.train
        self.accelerator = join_processes(
            config.run, trackers=train.trackers, hang_seconds=train.hang_seconds
        )
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device
        if self.device.type == "cpu":
            cpu.keep_memory()
        elif config.train.tf32:
            allow_tensor_float32()
        start = find_start(config, resume=resume)
        self.shards, self.checkpoints, found = start.shards, start.checkpoints, start.found
        self._launchers = start.launchers
        self.loader = together(
            lambda: build_train_loader(config, self.shards, self.rank, self.world_size, self.device)
        )
        segments = batch_of_each(config.data, self.world_size) * self.world_size
        self.global_batch = segments * config.train.accumulate
        self.step = 0
        self._replaced = 0
        self._shards_changed = False
        self.best = Best()
        self._build_model()
        changed = {} if found is None else together(lambda: self._restore(found))
        if self.accelerator.is_main_process:
            self.checkpoints.sweep()
            with publish(config.run / "config.yaml") as file:
                file.write(config.to_yaml().encode())
        self.journal = Journal(
            self.accelerator, config.run, step=self.step, total=config.train.total_steps
        )
        self.progress = self.journal.progress
        self.watchdog = Watchdog(
            config.train.hang_seconds,
            rank=self.rank,
            world_size=self.world_size,
            store=meeting_place(),
        )
        self._introduce()
        mixed = self.accelerator.mixed_precision
        if self.device.type == "cpu" and mixed == "bf16" and cpu.is_slow_in_bfloat16():
            self.journal.warn(self.step, cpu.SLOW_BFLOAT16)
        for error in found.damaged if found else ():
            self.progress.say(f"WARNING: {error}; goes on from step {self.step:,}")
        for key, (before, now) in changed.items():
            self.progress.say(f"note: {key} was {before} and is now {now}")

    def _introduce(self) -> None:
        config, split = self.config, self.shards["train"]
        weights = sum(weight.numel() for weight in self.bare.parameters())
        self.progress.say(
            f"{config.name}: {weights:,} weights, {len(self.shards.speakers):,} speakers, "
            f"{len(split):,} utterances to train on; {self.world_size} process(es) on "
            f"{self.device.type}, precision {self.accelerator.mixed_precision}, "
            f"{self.global_batch:,} segments a step, data on the {self.loader.placement}; "
            + (f"continues after step {self.step:,}" if self.step else f"run folder {config.run}")
        )

    def _build_model(self) -> None:
        config, optim = self.config, self.config.optim
        torch.manual_seed(config.train.seed)
        model = build_model(config.model, self.shards.manifest.n_mels, len(self.shards.speakers))
        if (path := config.train.start_from) is not None:
            speakers = tuple(self.shards.speakers)
            together(lambda: start_from(model, load(find_checkpoint(Path(path))), speakers))
        if config.train.sync_batchnorm:
            synchronise(model)
        optimizer = build_optimizer(optim, model, self.device)
        model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.bare: nn.Module = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        self.average: AveragedModel | None = None
        if config.train.average_decay:
            self.average = AveragedModel(self.bare, config.train.average_decay)
        self.criterion = build_loss(config.loss).to(self.device)
        self.train_step = TrainStep(
            self.accelerator,
            model,
            self.optimizer,
            self.criterion,
            build_plan(config, self.average, self.device),
            accumulate=config.train.accumulate,
            clip_norm=optim.clip_norm,
            max_skipped=config.train.max_skipped,
            seed=config.train.seed,
        )

    def fit(self) -> Outcome:
        """Train to the last step, to `train.stop_step`, or until a signal comes.

        Returns:
            How the run ended; a checkpoint of that step has been written.

        Raises:
            DivergedError: The loss or the gradient was not a finite number for too many steps.
            CheckpointError: The last checkpoint cannot be written.
        """
        train = self.config.train
        batches = self._batches()
        signal = 0
        self.train_step.throughput.network_seconds = lambda: self.shards.network_seconds
        self.train_step.throughput.restart()
        with StopSignals() as signals, self.watchdog:
            while self.step < train.total_steps:
                self.train_step(batches, self.step)
                self.step += 1
                self.progress.advance()
                last = self.step == train.total_steps
                if last or self.step % train.log_steps == 0:
                    self._log_training()
                if train.valid_steps and (last or self.step % train.valid_steps == 0):
                    self._validate()
                signal = self._agree(signals.received)
                stop = last or bool(signal) or self.step == train.stop_step
                if stop or self.step % train.save_steps == 0:
                    self._save(last=stop)
                if stop:
                    break
        self.progress.close()
        finished = self.step >= train.total_steps
        return Outcome(
            step=self.step,
            finished=finished,
            signal=0 if finished else signal,
            best_accuracy=self.best.accuracy,
            best_step=self.best.step,
        )

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        while True:
            self.watchdog.enter(READING, self.step)
            for batch in self.loader:
                self.watchdog.enter(COMPUTING, self.step)
                yield batch
                self.watchdog.enter(READING, self.step)

    def _window(self) -> Window:
        """The meter of all ranks, after making sure that not too many steps were skipped."""
        sums = combine(self.accelerator.gather(self.train_step.meter.sums.unsqueeze(0)))
        if sums.diverged:
            kept = "no checkpoint was written before"
            if self.checkpoints.newest is not None:
                kept = f"{self.checkpoints.newest} is from before"
            raise DivergedError(
                f"step {int(sums.diverged)}: the loss or the gradient is not a finite number, and "
                f"train.max_skipped allows {self.config.train.max_skipped} such steps in a row; "
                f"{kept}. Try a smaller --optim.lr, more --optim.warmup_steps, a smaller "
                "--optim.clip_norm, or `accelerate launch --mixed_precision bf16` in place of fp16"
            )
        return sums

    def _log_training(self) -> None:
        sums = self._window()
        group = self.optimizer.param_groups[0]
        record: dict[str, Any] = {
            "event": "train",
            "step": self.step,
            "epoch": self.loader.epoch,
            "loss": sums.loss / sums.samples if sums.samples else None,
            "accuracy": sums.correct / sums.samples if sums.samples else None,
            "grad_norm": sums.norm / sums.steps if sums.steps else None,
            "skipped": int(sums.skipped),
            "corrupt": self._corrupt(),
            "lr": group["lr"],
            **self.train_step.throughput.rates(self.world_size),
            "peak_memory_mib": peak_memory_mib(self.device),
        }
        self.journal.record(record)
        self.progress.show({key: math.nan if x is None else x for key, x in record.items()})
        if sums.skipped:
            self.progress.say(
                f"note: {int(sums.skipped)} step(s) up to step {self.step:,} skipped: the loss or "
                "the gradient was not a finite number"
            )
        self.train_step.meter.reset()
        self.train_step.throughput.restart()

    def _corrupt(self) -> int:
        """Segments since the last log step, of all ranks, whose utterance was damaged."""
        before, self._replaced = self._replaced, self.loader.replaced
        found = torch.tensor([self._replaced - before], device=self.device)
        return int(self.accelerator.gather(found).sum())

    def _validate(self) -> None:
        """Validate on whole utterances, and keep the weights if they are the best so far."""
        started = time.perf_counter()
        self._window()
        if self.world_size > 1:
            share_buffers(self.predictor)
        data, place = self.config.data, (self.rank, self.world_size)
        batches = build_eval_loader(data, self.shards, "val", *place)
        result = evaluate(
            self.predictor,
            self.watchdog.each(batches, VALIDATING, self.step),
            self.shards["val"].labels,
            device=self.device,
            criterion=self.criterion,
            reduce=lambda total: self.accelerator.reduce(total, "sum"),
            incomplete=data.on_corrupt == "skip",
        )
        record = {
            "event": "valid",
            "step": self.step,
            "loss": result.loss,
            "accuracy": result.accuracy,
            "correct": result.correct,
            "utterances": result.labelled,
            "seconds": time.perf_counter() - started,
        }
        self.journal.record(record)
        # Of equals the later: it has learnt more than a few validation utterances can show.
        better = self.best.accuracy is None or result.accuracy >= self.best.accuracy
        if better:
            before, self.best = self.best, Best(result.accuracy, self.step)
            # The best is what is on the disk: one that is not can still be surpassed, and saved.
            if self.accelerator.is_main_process and not self._try(self._save_best):
                self.best = before
        self.progress.say(
            f"validation at step {self.step:,}: accuracy {result.accuracy:.4f} "
            f"({result.correct:,} of {result.labelled:,}), loss {result.loss:.4f}"
            + (", the best so far" if better else "")
        )
        self.train_step.throughput.restart()

    @property
    def predictor(self) -> nn.Module:
        """What is validated and saved for prediction: the averaged model, or the model itself."""
        return self.bare if self.average is None else self.average.model

    def _agree(self, signal: int) -> int:
        """The largest signal that any rank received, known to all of them at the same step.

        On an accelerator the ranks ask one another at log steps only, for asking makes the host
        wait for the device.
        """
        if self.world_size == 1:
            return signal
        if self.device.type != "cpu" and self.step % self.config.train.log_steps:
            return 0
        asked = torch.tensor([signal], device=self.device)
        return int(self.accelerator.gather(asked).max())

    def _checkpoint(self, training: Training | None = None) -> Checkpoint:
        """What predicting takes, and what continuing takes if it is given."""
        return Checkpoint(
            step=self.step,
            best=self.best,
            config=self.config,
            speakers=tuple(self.shards.speakers),
            n_mels=self.shards.manifest.n_mels,
            fingerprint=self.shards.manifest.fingerprint,
            # Of the model itself, outside of any wrapper, whose names the weights would have.
            weights=self.predictor.state_dict(),
            training=training,
        )

    def _save(self, *, last: bool) -> None:
        """Write a checkpoint; every rank waits until it is on the disk, or has been refused.

        Raises:
            CheckpointError: It was refused, and was the last one.
        """
        window = self._window()
        self._look_at_shards()
        failed = False
        main = self.accelerator.is_main_process
        self.watchdog.enter(SAVING if main else WAITING, self.step)
        if main:
            training = gather_training(
                self.accelerator,
                self.optimizer,
                self.loader,
                global_batch=self.global_batch,
                launchers=self._launchers,
                meter=list(window),
                raw=None if self.average is None else self.bare.state_dict(),
            )
            checkpoint = self._checkpoint(training)
            failed = not self._try(lambda: self.checkpoints.save(checkpoint))
        told = self.accelerator.gather(torch.tensor([int(failed)], device=self.device))
        if last and bool(told.any()):
            newest = self.checkpoints.newest or "the beginning"
            raise CheckpointError(
                f"step {self.step:,}, at which the run ends, is not saved: see the warning above; "
                f"make room, then continue from {newest} with --resume"
            )
        self.train_step.throughput.restart()

    def _save_best(self) -> None:
        self.checkpoints.save_best(self._checkpoint())

    def _try(self, save: Callable[[], object]) -> bool:
        """Save; a disk that refuses costs a checkpoint, not the run. Returns whether it worked."""
        try:
            save()
        except CheckpointError as error:
            newest = "none is saved yet"
            if self.checkpoints.newest is not None:
                newest = f"the newest that is saved is {self.checkpoints.newest.name}"
            self.journal.warn(
                self.step,
                f"step {self.step:,}: {error}; {newest}, training continues, and the next save "
                "tries again",
            )
            return False
        return True

    def _look_at_shards(self) -> None:
        """Warn, once, if the folder holds another set than the one that is trained on.

        What is open already is that of the run; a shard that is not yet would be an error.
        """
        if self._shards_changed or not self.accelerator.is_main_process:
            return
        try:
            self.shards.check_unchanged()
        except CorruptShardError as error:
            self._shards_changed = True
            self.journal.warn(
                self.step,
                f"{error.file}: {error.what}; the run goes on with the shards that it has open, "
                "and can be resumed only on the set that it began on",
            )

    def _restore(self, found: Newest) -> Changes:
        """Continue from a checkpoint; returns the fields that were changed, as they may be."""
        saved, training = found.checkpoint, found.training
        check_same_data(self.shards, saved, self.config.data.shards)
        changed = check_same_run(
            self.config,
            saved.config,
            training,
            global_batch=self.global_batch,
            precision=str(self.accelerator.mixed_precision),
            processes=self.world_size,
        )
        load_weights(self.predictor, saved.weights, saved.file)
        if self.average is not None:
            load_weights(self.bare, training.raw or {}, saved.file)
        restore_training(self.accelerator, self.optimizer, self.loader, training, saved.file)
        # The optimiser has come back with that of the checkpoint; the rate is set in every step.
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.config.optim.weight_decay
        self.step, self.best = saved.step, saved.best
        if self.accelerator.is_main_process:
            # The sums are those of all ranks: they count once.
            self.train_step.meter.restore(training.meter)
        return changed

    def close(self) -> None:
        """Finish the trackers, the bar and the process group."""
        self.journal.close()
        self.accelerator.end_training()
