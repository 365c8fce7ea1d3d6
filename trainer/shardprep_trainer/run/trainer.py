"""The training loop: steps, logging, validation, checkpoints, and a clean end.

A step is an optimiser step. Its random numbers are a function of (seed, step, rank), and its data a
function of (seed, position), so a resumed run is the same as an uninterrupted one.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor

from shardprep import CorruptShardError, StorageError
from shardprep_trainer.checkpoint.state import Best, Checkpoint, Results, TrainedOn, Training
from shardprep_trainer.checkpoint.training import gather_training
from shardprep_trainer.errors import DivergedError
from shardprep_trainer.learning.metrics import Sums, combine, peak_memory_mib
from shardprep_trainer.model.sync_norm import share_buffers
from shardprep_trainer.processes.interrupt import StopSignals
from shardprep_trainer.processes.watchdog import (
    COMPUTING,
    READING,
    SAVING,
    VALIDATING,
    WAITING,
)
from shardprep_trainer.run.data import build_eval_loader
from shardprep_trainer.run.garbage import garbage_held
from shardprep_trainer.run.outcome import Outcome
from shardprep_trainer.run.start import Prepared
from shardprep_trainer.run.validation import Validated, Validation


class Trainer:
    """Takes the steps of a run; logs, validates and saves in between.

    In training, BatchNorm sees the batch of its own rank, or with `train.sync_batchnorm` those of
    all ranks. All ranks validate, and rank 0 saves, with the running statistics of rank 0.

    Args:
        run: The prepared run.

    Attributes:
        step: Steps done.
        best: The best validation so far.
    """

    def __init__(self, run: Prepared) -> None:
        self.config = run.config
        self.accelerator = run.accelerator
        self.rank, self.world_size = run.accelerator.process_index, run.accelerator.num_processes
        self.device = run.accelerator.device
        self.shards = run.shards
        self.speakers = run.speakers
        self.validation = run.validation
        self.loader = run.loader
        self.global_batch = run.global_batch
        self.train_step = run.train_step
        self.checkpoints = run.checkpoints
        self.claim = run.claim
        self.journal = run.journal
        self.progress = run.journal.progress
        self.watchdog = run.watchdog
        self.step = run.step
        self.best = run.best
        self._launchers = run.launchers
        self._replaced = 0
        self._shards_changed = False

    def fit(self) -> Outcome:
        """Train to the last step, to `train.stop_step`, or until a signal comes.

        Returns:
            How the run ended; a checkpoint of its last step is saved.

        Raises:
            DivergedError: The loss or the gradient was not a finite number for too many steps.
            StorageError: The last checkpoint cannot be saved.
        """
        train = self.config.train
        batches = self._batches()
        signal = 0
        self.train_step.throughput.network_seconds = lambda: self.shards.network_seconds
        self.train_step.throughput.restart()
        self.train_step.warn = lambda text: self.journal.warn(self.step, text)
        with StopSignals(self.claim.leave_soon) as signals, self.watchdog, garbage_held():
            while self.step < train.total_steps:
                self.train_step(batches, self.step)
                self.step += 1
                self.progress.advance()
                last = self.step == train.total_steps
                if last or self.step % train.log_steps == 0:
                    self._log_training()
                    gc.collect()
                if self.validation and (last or self.step % train.valid_steps == 0):
                    self._validate(self.validation)
                    gc.collect()
                signal = self._agree(signals.received)
                stop = last or bool(signal) or self.step == train.stop_step
                if stop:
                    self.claim.leave_soon()
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
            best_eer=self.best.eer if self.validation and self.validation.by_eer else None,
        )

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        """The training batches, with labels as the head numbers them."""
        numbers = None
        if not self.speakers.all_of_the_shards:
            numbers = torch.from_numpy(self.speakers.numbers).to(self.device)
        while True:
            self.watchdog.enter(READING, self.step)
            for batch in self.loader:
                self.watchdog.enter(COMPUTING, self.step)
                if numbers is not None:
                    batch["label"] = numbers[batch["label"]]
                yield batch
                self.watchdog.enter(READING, self.step)

    def _sums(self) -> Sums:
        """The meter's sums over all ranks.

        Raises:
            DivergedError: Too many steps were skipped in a row.
        """
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
        sums = self._sums()
        group = self.train_step.optimizer.param_groups[0]
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

    def _validate(self, validation: Validation) -> None:
        """Validate on whole utterances, and save the model if it is the best so far."""
        started = time.perf_counter()
        self._sums()
        if self.world_size > 1:
            share_buffers(self.train_step.predictor)
        data, place = self.config.data, (self.rank, self.world_size, self.device)
        batches = build_eval_loader(data, self.shards, "val", *place)
        with self.accelerator.autocast():
            found = validation(
                self.train_step.predictor,
                self.watchdog.each(batches, VALIDATING, self.step),
                device=self.device,
                criterion=self.train_step.criterion,
                reduce=lambda total: self.accelerator.reduce(total, "sum"),
                incomplete=data.on_corrupt == "skip",
            )
        counts, verified = found.evaluation, found.verified
        record = {
            "event": "valid",
            "step": self.step,
            "loss": counts.loss if counts.labelled else None,
            "accuracy": found.accuracy,
            "correct": counts.correct,
            "utterances": counts.labelled,
            "eer": found.eer,
            "min_dcf": None if verified is None else verified.min_dcf,
            "trials": 0 if verified is None else verified.trials,
            "seconds": time.perf_counter() - started,
        }
        self.journal.record(record)
        better = validation.is_better(found, self.best)
        if better:
            before, self.best = self.best, Best(found.accuracy, self.step, found.eer)
            # If the disk refuses, the model that was saved before stays the best: a later model
            # need only be better than that one.
            if self.accelerator.is_main_process and self._try(lambda: self._save_best(found)):
                self.best = before
        self.progress.say(
            f"validation at step {self.step:,}: {validation.describe(found)}"
            + (", the best so far" if better else "")
        )
        self.train_step.throughput.restart()

    def _agree(self, signal: int) -> int:
        """The largest signal that any rank received; all ranks learn of it at the same step.

        On an accelerator the ranks exchange signals at log steps only: the host must wait for the
        device to do so.
        """
        if self.world_size == 1:
            return signal
        if self.device.type != "cpu" and self.step % self.config.train.log_steps:
            return 0
        own = torch.tensor([signal], device=self.device)
        return int(self.accelerator.gather(own).max())

    def _checkpoint(self, training: Training | None = None) -> Checkpoint:
        """What predicting takes, and what continuing takes if it is given."""
        return Checkpoint(
            step=self.step,
            best=self.best,
            config=self.config,
            speakers=self.speakers.names,
            n_mels=self.shards.n_mels,
            fingerprint=self.shards.fingerprint,
            features=self.shards.features,
            dtype=self.shards.dtype,
            # Of the model itself: a wrapper would change the names of the weights.
            weights=self.train_step.predictor.state_dict(),
            training=training,
        )

    def _save(self, *, last: bool) -> None:
        """Write a checkpoint; every rank waits until it is on the disk or the disk has refused.

        Raises:
            StorageError: The disk refused the last checkpoint of the run.
        """
        sums = self._sums()
        self._check_shards()
        refusal: StorageError | None = None
        main = self.accelerator.is_main_process
        self.watchdog.enter(SAVING if main else WAITING, self.step)
        if main:
            averaged = self.train_step.plan.average is not None
            training = gather_training(
                self.accelerator,
                self.train_step.optimizer,
                self.loader,
                global_batch=self.global_batch,
                launchers=self._launchers,
                meter=list(sums),
                raw=self.train_step.bare.state_dict() if averaged else None,
            )
            checkpoint = self._checkpoint(training)
            refusal = self._try(lambda: self.checkpoints.save(checkpoint))
        failed = torch.tensor([int(refusal is not None)], device=self.device)
        if last and bool(self.accelerator.gather(failed).any()):
            newest = self.checkpoints.newest
            kept = "nothing is" if newest is None else f"--resume continues from {newest}"
            why = "process 0 says why" if refusal is None else refusal.what
            raise StorageError(
                f"step {self.step:,}, at which the run ends, is not saved ({why}); {kept}",
                file=self.checkpoints.folder,
                remedy=None if refusal is None else refusal.remedy,
            )
        self.train_step.throughput.restart()

    def _save_best(self, found: Validated) -> None:
        """Save the model as the best, with what its validation found."""
        train, verified = self.shards["train"], found.verified
        results = Results(
            utterances=found.evaluation.labelled,
            accuracy=found.accuracy,
            trials=0 if verified is None else verified.trials,
            eer=found.eer,
            min_dcf=None if verified is None else verified.min_dcf,
            new_speakers=self.validation is not None and self.validation.by_eer,
        )
        best = replace(
            self._checkpoint(),
            thresholds=None if verified is None else verified.thresholds,
            calibration=found.calibration,
            trained_on=TrainedOn(len(train), int(train.frames.sum(dtype=np.int64))),
            results=results,
        )
        self.checkpoints.save_best(best)

    def _try(self, save: Callable[[], object]) -> StorageError | None:
        """Save; a disk that refuses costs a checkpoint, not the run. Returns the refusal."""
        try:
            save()
        except StorageError as error:
            newest = "none is saved yet"
            if self.checkpoints.newest is not None:
                newest = f"the newest that is saved is {self.checkpoints.newest.name}"
            self.journal.warn(
                self.step,
                f"step {self.step:,}: {error.file}: {error.what}; {newest}, training continues, "
                "and the next save tries again",
            )
            return error
        return None

    def _check_shards(self) -> None:
        """Warn once if another set has replaced the one that is trained on.

        The run has its shards open and continues; opening one more would be an error.
        """
        if self._shards_changed or not self.accelerator.is_main_process:
            return
        try:
            self.shards.check_unchanged()
        except CorruptShardError as error:
            self._shards_changed = True
            self.journal.warn(
                self.step,
                f"{error.file}: {error.what}; the run continues with the shards that it has open, "
                "and can be resumed only on the set that it began on",
            )

    def close(self) -> None:
        """End the loader, the trackers, the bar and the process group; give up the run folder."""
        try:
            self.loader.close()
            self.journal.close()
            self.accelerator.end_training()
        finally:
            self.claim.release()
