"""Training that is killed at random moments ends like an undisturbed run."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from scripts.torture import training as kills


def test_kills_come_in_order_and_name_processes_that_exist() -> None:
    rng = random.Random(1)
    plans = [kills.plan(rng, processes, 4) for processes in (1, 2) for _ in range(50)]
    for plan in plans:
        steps = [kill.after_step for kill in plan]
        assert steps == sorted(set(steps))
        assert 2 <= steps[0] < steps[-1] < kills.STEPS
    assert {kill.rank for plan in plans[:50] for kill in plan} == {None}
    assert {kill.rank for plan in plans[50:] for kill in plan} == {None, 0, 1}


def test_outcomes_are_compared_bit_for_bit() -> None:
    one = torch.tensor([1.0])
    assert kills.equal(([{"loss": 0.1}], [one]), ([{"loss": 0.1}], [one.clone()]))
    assert not kills.equal([one], [one.nextafter(torch.tensor([2.0]))])
    assert not kills.equal([one], [one, one])
    assert not kills.equal([{"loss": 0.1}], [{"loss": 0.1 + 2e-17 + 1e-16}])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "count"),
    [(2, 1), (1, 3), (2, 3)],
)
def test_a_killed_run_ends_like_an_undisturbed_one_bit_for_bit(
    processes: int, count: int, tmp_path: Path
) -> None:
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    plan = kills.plan(rng, processes, count)
    if processes == 2 and count == 1:
        # Kill one process only: torchrun restarts the group by itself, without --resume.
        plan = [kills.Kill(kill.after_step, kill.delay, rng.randrange(2)) for kill in plan]
    print(f"seed {seed}: {plan}")
    shards = kills.synthesise(tmp_path)
    kills.undisturbed(tmp_path / "undisturbed", shards, processes)
    assert kills.disturbed(tmp_path / "killed", shards, processes, plan)
    curve, states = kills.outcome(tmp_path / "killed")
    assert [row["step"] for row in curve if row["event"] == "train"] == [*range(1, 25)]
    assert len(states[0][2]) > 100
    assert kills.equal((curve, states), kills.outcome(tmp_path / "undisturbed"))


@pytest.mark.parametrize(("equal", "code"), [(3, 0), (2, 1)])
def test_the_result_says_what_was_asked_and_the_code_whether_all_were_equal(
    equal: int, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kills, "synthesise", lambda folder: folder)
    answer = {"asked": 3, "equal": equal, "seed": 0, "rounds": []}
    monkeypatch.setattr(kills, "measure", lambda *arguments: answer)
    out = tmp_path / "new" / "kills.json"
    done = CliRunner().invoke(kills.main, ["--rounds", "3", "--out", str(out)])
    assert done.exit_code == code, done.output
    found = json.loads(out.read_text())
    assert (found["asked"], found["equal"]) == (3, equal)
