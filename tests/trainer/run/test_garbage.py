"""Garbage is collected between steps, never within one, and as before when a run has ended."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
from torch import Tensor

from shardprep_trainer.config.fields import Config
from shardprep_trainer.run.garbage import garbage_held
from shardprep_trainer.run.start import prepare
from shardprep_trainer.run.trainer import Trainer

ConfigFactory = Callable[..., Config]


class Circle:
    """Refers to itself: only a collection frees it."""

    def __init__(self) -> None:
        self.own = self


@pytest.mark.parametrize("enabled", [True, False])
def test_afterwards_all_is_as_it_was_also_after_an_error(enabled: bool) -> None:
    assert gc.isenabled()
    frozen = gc.get_freeze_count()
    if not enabled:
        gc.disable()
    try:
        seen = []

        def fail() -> None:
            with garbage_held():
                seen.append((gc.isenabled(), gc.get_freeze_count() > frozen))
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        assert seen == [(False, True)]
        assert gc.isenabled() == enabled
        assert gc.get_freeze_count() == frozen
    finally:
        gc.enable()


def test_what_others_have_frozen_stays_so() -> None:
    gc.freeze()
    try:
        with garbage_held():
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


def test_a_run_collects_at_its_log_steps(
    make_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"train.log_steps": 4, "train.valid_steps": 0, "train.save_steps": 100}
    trainer = Trainer(prepare(make_config(**changes)))
    fetch, made, alive = trainer.train_step.throughput.fetch, [], []

    def fetch_and_litter(batches: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
        assert not gc.isenabled()
        alive.append([circle() is not None for circle in made])
        made.append(weakref.ref(Circle()))
        return fetch(batches)

    monkeypatch.setattr(trainer.train_step.throughput, "fetch", fetch_and_litter)
    trainer.fit()
    trainer.close()
    # Before each of 12 steps; a collection has come after the fourth and the eighth.
    assert [sum(row) for row in alive] == [0, 1, 2, 3] * 3
    assert gc.isenabled()
