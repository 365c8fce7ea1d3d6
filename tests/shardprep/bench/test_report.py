"""The report of `shardprep bench`: every loader once, ratios that follow from the rates."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from shardprep import BuildReport, FormatError, SourceError, open_shards
from shardprep.bench import report as bench
from shardprep.bench.measure import Candidate, Measurements, Rate
from shardprep.bench.report import BenchOptions, BenchReport, bench_shards
from shardprep.bench.results import LIMIT, LimitResult, best_limit, summarise

# webdataset relies on the garbage collector to close its files.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

QUICK = BenchOptions(batch_size=8, segment_frames=64, rounds=2, seconds=0.02)


def nothing(*_: object) -> None: ...


def measurements_of(**rates: list[float]) -> Measurements:
    return Measurements({name: [Rate(rate, 1, 0) for rate in own] for name, own in rates.items()})


@pytest.fixture(scope="module")
def report(edge_sets: dict[tuple[str, str], Path], edge_source: Path) -> BenchReport:
    sets = [edge_sets["float16", codec] for codec in ("none", "zstd")]
    return bench_shards(sets, edge_source, QUICK, nothing)


def test_every_way_to_read_is_measured(
    report: BenchReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores = report.machine.cores
    names = [f"files, {workers} workers" for workers in (0, cores)]
    for codec in ("none", "zstd"):
        # Four shards: more workers would have nothing to read.
        names += [f"webdataset {codec}, {workers} workers" for workers in (0, min(cores, 4))]
        names.append(f"shardprep {codec}, one process")
    assert [loader.name for loader in report.loaders] == [*names, LIMIT]
    assert [result.loader for result in report.sets] == [
        "shardprep none, one process",
        "shardprep zstd, one process",
    ]


def test_rates_and_ratios_fit_each_other(report: BenchReport) -> None:
    limit = report.loaders[-1]
    files = max(loader.samples_per_s for loader in report.loaders if loader.kind == "files")
    for loader in report.loaders:
        assert len(loader.rounds) == 2
        assert loader.samples_per_s == statistics.median(loader.rounds) > 0
        assert loader.gb_per_s == pytest.approx(loader.samples_per_s * 64 * 7 * 2 / 1e9)
        assert loader.to_files == pytest.approx(loader.samples_per_s / files)
        assert loader.to_limit == pytest.approx(loader.samples_per_s / limit.samples_per_s)
    assert limit.samples_per_s == max(report.limit.tried.values())
    assert report.batch == (8, 64, 7)


def test_the_limit_is_as_large_as_the_matrices(report: BenchReport, edge_set: Path) -> None:
    split = open_shards(edge_set)["train"]
    nbytes = sum(split.read(index).nbytes for index in range(len(split)))
    assert nbytes - 64 * 7 * 2 < report.limit.nbytes <= nbytes
    assert not report.notes


def test_progress_is_told_the_number_of_measurements(edge_set: Path) -> None:
    told: list[tuple[str, int]] = []
    report = bench_shards([edge_set], None, QUICK, lambda *call: told.append(call))
    assert {expected for _, expected in told} == {len(told)}
    assert len(told) == 2 * (len(report.loaders) - 1 + len(report.limit.tried))
    assert [loader.name for loader in report.loaders][-2:] == ["shardprep, one process", LIMIT]
    assert all(loader.to_files is None for loader in report.loaders)


def test_a_set_given_twice_is_measured_once(edge_set: Path) -> None:
    assert len(bench_shards([edge_set, edge_set], None, QUICK, nothing).sets) == 1


def test_sets_of_one_codec_are_told_apart_by_their_folders(
    edge_set: Path, edge_source: Path, tmp_path: Path, build: Callable[..., BuildReport]
) -> None:
    build(edge_source, tmp_path / "large", samples_per_shard=50, val_fraction=0.2)
    report = bench_shards([edge_set, tmp_path / "large"], None, QUICK, nothing)
    ours = [loader.name for loader in report.loaders if loader.kind == "shardprep"]
    assert ours == [
        f"shardprep {edge_set}, one process",
        f"shardprep {tmp_path}/large, one process",
    ]
    assert [result.codec for result in report.sets] == ["none", "none"]


def test_a_small_split_makes_the_batch(edge_set: Path) -> None:
    options = BenchOptions(split="val", batch_size=256, segment_frames=64, rounds=1, seconds=0.01)
    report = bench_shards([edge_set], None, options, nothing)
    count = len(open_shards(edge_set)["val"])
    assert report.batch[0] == count == report.utterances
    assert report.notes == [f"batches of {count}, not 256: the split has no more utterances"]


def test_short_memory_is_noted(edge_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "limit_rows", lambda nbytes, shape: 9)
    report = bench_shards([edge_set], None, QUICK, nothing)
    assert report.limit.nbytes == 9 * 64 * 7 * 2
    (note,) = report.notes
    assert note.startswith(f"the limit gathers from {9 * 64 * 7 * 2:,} bytes, not from the split's")


def test_unlabelled_utterances_can_be_measured_too(edge_set: Path, edge_source: Path) -> None:
    options = BenchOptions(split="test", batch_size=4, segment_frames=64, rounds=1, seconds=0.01)
    assert bench_shards([edge_set], edge_source, options, nothing).utterances == 6


def test_a_split_that_is_missing_is_refused(edge_set: Path) -> None:
    with pytest.raises(FormatError, match="no split 'dev'; the set has train, val, test"):
        bench_shards([edge_set], None, BenchOptions(split="dev"), nothing)


def test_another_source_is_refused(edge_set: Path, make_dataset: Callable[..., Path]) -> None:
    with pytest.raises(SourceError, match="is not the data set that .* was built from"):
        bench_shards([edge_set], make_dataset(), QUICK, nothing)


@pytest.mark.parametrize("other", [("float32", "none"), "another set"])
def test_sets_of_other_data_are_refused(
    edge_sets: dict[tuple[str, str], Path],
    make_dataset: Callable[..., Path],
    tmp_path: Path,
    build: Callable[..., BuildReport],
    other: tuple[str, str] | str,
) -> None:
    folder = edge_sets.get(other, tmp_path / "shards")  # type: ignore[call-overload]
    if folder == tmp_path / "shards":
        build(make_dataset(), folder)
    with pytest.raises(FormatError, match="is not that of .*: other utterances or another dtype"):
        bench_shards([edge_sets["float16", "none"], folder], None, QUICK, nothing)


def test_the_fastest_way_to_gather_is_the_limit() -> None:
    measured = measurements_of(slow=[1.0, 2.0, 900.0], fast=[5.0, 4.0, 3.0])
    ways = [Candidate(name, "limit", lambda: iter(())) for name in ("slow", "fast")]
    assert best_limit(measured, ways, 77) == LimitResult("fast", 77, {"slow": 2.0, "fast": 4.0})


def test_ratios_are_to_the_best_file_loader_and_failures_are_left_out() -> None:
    measured = measurements_of(none=[10.0], two=[20.0], ours=[400.0], take=[500.0], torch=[800.0])
    measured.failures["broken"] = "ValueError: no"
    kinds = {"none": "files", "two": "files", "ours": "shardprep", "broken": "litdata"}
    candidates = [Candidate(name, kind, lambda: iter(())) for name, kind in kinds.items()]
    ways = [Candidate(name, "limit", lambda: iter(())) for name in ("take", "torch")]
    limit = best_limit(measured, ways, 1)
    results = summarise(measured, [*candidates, *ways], limit, 1_000_000)
    assert [(r.name, r.to_files, r.to_limit, r.gb_per_s) for r in results] == [
        ("none", 0.5, 0.0125, 0.01),
        ("two", 1.0, 0.025, 0.02),
        ("ours", 20.0, 0.5, 0.4),
        (LIMIT, 40.0, 1.0, 0.8),
    ]
    assert json.dumps([r.rounds for r in results]) == "[[10.0], [20.0], [400.0], [800.0]]"
