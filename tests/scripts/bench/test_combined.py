"""Prediction together against prediction alone: what the medians are of."""

from __future__ import annotations

from scripts.bench.combined import __main__ as bench


def test_ratios_are_medians_of_ratios_within_a_round() -> None:
    def times(alone: float, combined: float) -> dict[str, tuple[float, float]]:
        each = dict.fromkeys(bench.MODELS, (alone / 3, alone / 2))
        return {**each, "combined": (combined, combined)}

    rounds = [times(3.0, 3.3), times(30.0, 30.6), times(6.0, 9.0)]
    found = bench.summary(rounds)
    assert found["ratio"] == 1.1
    assert found["cpu_ratio"] == round(3.3 / 4.5, 4)
    assert found["seconds"] == dict.fromkeys(bench.MODELS, 2.0) | {"combined": 9.0}


def test_every_second_round_is_in_the_other_order() -> None:
    called: list[str] = []

    def predictor(name: str) -> list[str]:
        called.append(name)
        return []

    alone = {name: lambda name=name: predictor(name) for name in bench.MODELS}
    for turned in (False, True):
        bench.one_round(alone, lambda: predictor("combined"), turned=turned)
    names = [*bench.MODELS, "combined"]
    assert called == [*names, *reversed(names)]
