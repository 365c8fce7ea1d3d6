"""The model of a cluster agrees with simple arithmetic and with measurements."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from scripts.simulate import __main__ as scale
from scripts.simulate import job as jobs
from scripts.simulate import measure, model
from shardprep.load.orders.windowed import WindowedOrder
from shardprep.load.read_ahead import plan_for_cache
from shardprep.read import store_map

ROOT = Path(__file__).resolve().parents[3]

# Nothing limits the speed but the constants that a test sets.
FREE = jobs.Calibration(0.0, 1e6, 1e6, 1e9)
JOB = jobs.Job(
    utterances=64_000,
    bytes_each=50_000,
    samples_per_shard=100,
    ranks=2,
    batch=32,
    step_s=0.01,
    cache_gb=10.0,
    node_mb_per_s=1e6,
    store_mb_per_s=1e6,
)


def first(job: Any, calibration: Any = FREE) -> Any:
    return model.simulate(job, calibration)[0]


def test_with_a_fast_network_only_computing_takes_time() -> None:
    figures = first(JOB)
    assert figures.seconds == pytest.approx(JOB.steps * JOB.step_s, rel=0.01)
    assert figures.samples_per_s == pytest.approx(64 / 0.01, rel=0.01)
    assert figures.waiting < 0.01
    assert figures.fetched_gb == pytest.approx(3.2)
    assert scale.limit(JOB, FREE, figures) == "computing"


@pytest.mark.parametrize("where", ["node_mb_per_s", "store_mb_per_s"])
def test_a_slow_network_limits_the_speed(where: str) -> None:
    job = replace(JOB, **{where: 100.0})
    figures = first(job)
    assert figures.seconds == pytest.approx(3_200 / 100, rel=0.03)
    assert figures.waiting == pytest.approx(1 - 10 / 32, abs=0.02)
    name = "the store" if where.startswith("store") else "the network of a node"
    assert scale.limit(job, FREE, figures) == name


def test_all_nodes_share_the_store() -> None:
    job = replace(JOB, nodes=4, store_mb_per_s=200.0, step_s=0.001)
    assert first(job).samples_per_s == pytest.approx(200e6 / 50_000, rel=0.06)
    apart = replace(job, store_mb_per_s=1e6, node_mb_per_s=50.0)
    assert first(apart).samples_per_s == pytest.approx(200e6 / 50_000, rel=0.06)


def test_latency_limits_the_speed_of_small_requests() -> None:
    # A request for each shard, eight at once for each of two ranks.
    figures = first(replace(JOB, step_s=0.001), replace(FREE, request_latency_s=0.5))
    assert figures.seconds == pytest.approx(640 / (2 * 8) * 0.5, rel=0.04)
    large = replace(JOB, samples_per_shard=400, window_shards=1, step_s=0.001)
    # 20 MB are three requests.
    assert large.stream(replace(FREE, request_latency_s=0.5)) == pytest.approx(20e6 / 1.5, rel=0.01)


def test_a_process_is_no_faster_than_its_downloads_and_its_loader() -> None:
    narrow = replace(FREE, process_mb_per_s=40.0)
    assert first(JOB, narrow).seconds == pytest.approx(3_200 / 80, rel=0.04)
    slow = replace(FREE, loader_per_s=1_000.0)
    assert first(JOB, slow).samples_per_s == pytest.approx(2_000, rel=0.02)


def test_what_is_in_the_cache_is_not_fetched_again() -> None:
    job = replace(JOB, node_mb_per_s=100.0)
    cold, warm, third = model.simulate(job, FREE, epochs=3)
    assert cold.fetched_gb == pytest.approx(3.2)
    assert warm.fetched_gb == third.fetched_gb == 0
    assert warm.waiting < 0.01
    later = model.simulate(job, FREE, first=9, warm=True)[0]
    assert later.fetched_gb == 0


def test_half_a_cache_is_worth_less_than_half() -> None:
    # With a new random order in each epoch, a least-recently-used cache of share c has the hit rate
    # c + (1 - c) ln (1 - c), plus the first shards of an epoch, which are wanted before they are
    # removed.
    job = replace(JOB, cache_gb=1.6, node_mb_per_s=100.0)
    _, *later = model.simulate(job, FREE, epochs=4)
    hits = 1 - np.mean([figures.fetched_gb for figures in later]) / 3.2
    assert 0.5 + 0.5 * np.log(0.5) <= hits <= 0.4


def test_a_node_keeps_the_parts_of_epochs_that_it_has_seen() -> None:
    job = replace(JOB, nodes=8, batch=8)
    shares = []
    for epoch in (1, 4, 16):
        nodes = [model.Node(1e12) for _ in range(8)]
        model.fill(job, nodes, epoch)
        shares.append(np.mean([len(node.files) for node in nodes]) / job.shards)
    assert shares == pytest.approx([1 - (7 / 8) ** epoch for epoch in (1, 4, 16)], abs=0.03)


@settings(deadline=None, max_examples=30)
@given(
    factor=st.floats(1.0, 20.0),
    what=st.sampled_from(["node_mb_per_s", "store_mb_per_s"]),
    bandwidth=st.floats(5.0, 500.0),
    step_ms=st.floats(0.5, 20.0),
    nodes=st.sampled_from([1, 2, 4]),
    samples=st.sampled_from([40, 100, 400]),
)
def test_more_bandwidth_makes_nothing_slower(
    factor: float, what: str, bandwidth: float, step_ms: float, nodes: int, samples: int
) -> None:
    job = replace(
        JOB,
        utterances=16_000,
        nodes=nodes,
        samples_per_shard=samples,
        window_shards=1,
        step_s=step_ms / 1000,
        **{what: bandwidth},
    )
    assume(job.fits)
    slow, fast = first(job), first(replace(job, **{what: factor * bandwidth}))
    assert fast.seconds <= slow.seconds * (1 + 1e-6)


@settings(deadline=None, max_examples=30)
@given(
    job=st.builds(
        jobs.Job,
        utterances=st.integers(5_000, 20_000),
        bytes_each=st.floats(1_000, 100_000),
        samples_per_shard=st.integers(20, 300),
        nodes=st.integers(1, 3),
        ranks=st.integers(1, 3),
        batch=st.sampled_from([4, 16, 32]),
        step_s=st.floats(1e-4, 0.05),
        lanes=st.sampled_from([1, 2]),
        window_shards=st.integers(1, 4),
        cache_gb=st.floats(0.1, 5.0),
        node_mb_per_s=st.floats(10, 1e4),
        store_mb_per_s=st.floats(10, 1e4),
    ),
    latency=st.floats(0, 0.2),
)
def test_no_epoch_is_faster_than_its_bounds(job: Any, latency: float) -> None:
    assume(job.fits)
    calibration = jobs.Calibration(latency, 90.0, 400.0, 1e5)
    epochs = model.simulate(job, calibration, epochs=2)
    fastest = min(jobs.bounds(job, calibration).values())
    # The utterances after the last step are not used, and only some of them are fetched.
    used = job.steps * job.global_batch / job.utterances
    assert epochs[0].samples_per_s <= fastest / (1 - job.samples_per_shard / job.utterances) / used
    for figures in epochs:
        assert figures.samples_per_s <= job.global_batch / job.step_s * (1 + 1e-9)
        assert 0 <= figures.waiting < 1
        assert figures.seconds >= job.steps * job.step_s * (1 - 1e-9)
        # With a cache that holds everything, each node fetches a shard at most once.
        if job.cache_gb * 1e9 > 2 * job.set_bytes:
            assert epochs[0].fetched_gb <= job.nodes * job.shards * job.shard_bytes / 1e9 * 1.001


def test_equal_jobs_have_equal_figures() -> None:
    job = replace(JOB, nodes=2, node_mb_per_s=60.0)
    assert model.simulate(job, FREE, epochs=2) == model.simulate(job, FREE, epochs=2)


def test_ranks_want_the_shards_that_they_draw_from() -> None:
    job = replace(JOB, utterances=6_400, lanes=2)
    order = WindowedOrder([100] * 64, 0, 3, global_batch=64, lanes=4, window_shards=4)
    shard = order(np.arange(6_400)).reshape(100, 4, 16) // 100
    plan = model.plan(job, 3)
    for rank, all_wanted in enumerate(plan.all_wanted):
        drawn = shard[:, 2 * rank : 2 * rank + 2].reshape(100, -1)
        assert {wanted.shard for wanted in all_wanted} == set(drawn.flatten().tolist())
        for wanted in all_wanted:
            steps = np.flatnonzero((drawn == wanted.shard).any(1))
            assert wanted.first == steps[0]
            # The rank holds the shard from before its first use until after its last.
            assert wanted.begin - plan.block <= steps[0] * plan.each
            assert steps[-1] * plan.each <= wanted.end + plan.block


def test_what_does_not_fit_is_refused_as_the_loader_refuses_it() -> None:
    class Split:
        name, place = "train", Path("shards")
        shard_bytes = np.full(JOB.shards, JOB.shard_bytes)

        def __len__(self) -> int:
            return JOB.utterances

    for lanes, window in ((1, 1), (2, 4), (4, 2)):
        job = replace(JOB, lanes=lanes, window_shards=window)
        for cache, fits in ((0.98, False), (1.02, True)):
            sized = replace(job, cache_gb=cache * job.needed * job.ranks / 0.75e9)
            assert sized.fits is fits
            room = int(sized.room)
            if fits:
                plan_for_cache(Split(), "windowed", lanes, window, room)  # type: ignore[arg-type]
                continue
            with pytest.raises(ValueError, match="GB of shards at a time"):
                model.simulate(sized, FREE)
            with pytest.raises(Exception, match="has room for"):
                plan_for_cache(Split(), "windowed", lanes, window, room)  # type: ignore[arg-type]
    assert jobs.ROOM_SHARE == store_map._WANTED


def test_recommended_shards_fit_and_are_no_worse_than_others() -> None:
    calibration = jobs.Calibration()
    base = replace(JOB, nodes=4, ranks=8, step_s=0.005, node_mb_per_s=500.0, store_mb_per_s=5e3)
    chosen = scale.recommend(base, calibration, disk_gb=1_000.0)
    assert chosen.fits
    assert chosen.world * chosen.lanes * chosen.window_shards >= scale.MIXING

    def seconds(job: Any) -> float:
        early, later = scale.predict(job, calibration)
        return float(early.seconds + 9 * later.seconds)

    for samples in (400, 800):
        other = replace(chosen, samples_per_shard=samples)
        assert not other.fits or seconds(chosen) <= 1.03 * seconds(other)
    with pytest.raises(ValueError, match="no size of shards fits"):
        scale.recommend(base, calibration, disk_gb=0.01)


def test_the_bytes_of_an_utterance_are_those_in_a_shard(tmp_path: Path) -> None:
    import torch

    import shardprep

    (tmp_path / "Dataset").mkdir()
    rows = [{"feature_path": f"{n}.pt", "mel_len": 100} for n in range(40)]
    for row in rows:
        torch.save(torch.zeros(100, 40), tmp_path / "Dataset" / str(row["feature_path"]))
    metadata = {"n_mels": 40, "speakers": {"one": rows}}
    (tmp_path / "Dataset" / "metadata.json").write_text(json.dumps(metadata))
    options = shardprep.BuildOptions(val_fraction=0, workers=1)
    shardprep.build_shards(tmp_path / "Dataset", tmp_path / "shards", options)
    (shard,) = (tmp_path / "shards").glob("train-*.tar")
    assert shard.stat().st_size == pytest.approx(40 * scale.stored(100, 40), abs=10_240)


def test_the_check_compares_predicted_with_measured_figures() -> None:
    predicted = model.simulate(JOB, FREE, epochs=2)
    rows = [
        {
            "name": "one",
            "job": asdict(JOB),
            "calibration": asdict(FREE),
            "epochs": [
                {**asdict(row), "samples_per_s": 0.5 * row.samples_per_s} for row in predicted
            ],
        }
    ]
    assert [row["ratio"] for row in scale.check(rows)] == pytest.approx([2, 2])
    assert scale.checked(rows).count("| one |") == 2


@pytest.mark.remote
@pytest.mark.slow
def test_real_loaders_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "UTTERANCES", 640)
    environment = dict(os.environ)
    (found,) = measure.measure_all(2, ("small cache, 2 ranks",))
    assert os.environ == environment
    job, (cold, warm) = found.trial.job, found.epochs
    # The cache holds everything, so the second epoch fetches nothing.
    assert cold.fetched_gb == pytest.approx(640 * job.bytes_each / 1e9, rel=0.01)
    assert warm.fetched_gb == 0
    for figures in found.epochs:
        assert figures.seconds >= 10 * job.step_s
        assert 0 < figures.samples_per_s <= job.global_batch / job.step_s
        assert 0 < figures.waiting < 1
    assert min(asdict(found.calibration).values()) > 0


def test_constants_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "remote.json"
    for text in (asdict(FREE), {"machine": {}, "calibration": {**asdict(FREE), "more": 1}}):
        path.write_text(json.dumps(text))
        assert jobs.Calibration.read(path) == FREE


def test_the_command_prints_the_results_of_the_functions() -> None:
    options = ["--utterances", "40000"]
    run = CliRunner().invoke(scale.main, [*options, "--json"], catch_exceptions=False)
    found = json.loads(run.stdout)
    job = jobs.Job(**found["job"])
    assert job.utterances == 40_000
    assert found["first_epoch"]["seconds"] == model.simulate(job, jobs.Calibration())[0].seconds
    text = CliRunner().invoke(scale.main, options).stdout
    assert f"{found['first_epoch']['samples_per_s']:,.0f} samples/s" in text
    small = CliRunner().invoke(scale.main, [*options, "--cache-gb", "0.01"])
    assert small.exit_code == 2
    assert "GB of shards at a time" in small.stderr


@pytest.mark.slow
def test_the_page_shows_the_tables_of_the_script() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text()
    for part in scale.markdown(json.loads(scale.RESULT.read_text())).split("\n\n"):
        assert part in page
