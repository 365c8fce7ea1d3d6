"""The comparison with peers: all read the same utterances; the result says what was measured."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import shardprep
from scripts.bench import loader as bench_loader
from scripts.bench import loader_plot as bench_plot
from scripts.bench import peers
from shardprep.bench.loaders import SegmentShape
from shardprep.bench.measure import in_own_process
from shardprep.bench.results import LoaderResult

# We do not care about the warnings of the peers.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

SHAPE = SegmentShape(4, 32, 40, np.dtype("<f2"))
SPEAKERS = 16


@pytest.fixture
def shards(make_dataset: Callable[..., Path], tmp_path: Path) -> Path:
    # One utterance for each speaker, so that the label identifies it; some shorter than a segment.
    source = make_dataset(speakers=SPEAKERS, utterances=1, test_utterances=0, frames=(20, 60))
    shardprep.build_shards(source, tmp_path / "shards", shardprep.BuildOptions(workers=1))
    return tmp_path / "shards"


def is_segment_of(segment: np.ndarray, mel: np.ndarray) -> bool:
    length = min(len(segment), len(mel))
    return bool((segment[length:] == -20).all()) and any(
        np.array_equal(segment[:length], mel[start : start + length])
        for start in range(len(mel) - length + 1)
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("peer", peers.PEERS, ids=lambda peer: peer.name)
def test_peers_give_the_same_segments_of_all_utterances(
    shards: Path, tmp_path: Path, peer: Any, workers: int
) -> None:
    if not peer.installed:
        pytest.skip(f"{peer.package} is not installed")
    folder = tmp_path / "converted"
    folder.mkdir()
    in_own_process(lambda: peer.convert(shards, folder), 120)
    (candidate,) = (c for c in peer.candidates(folder, SHAPE) if c.workers == workers)
    assert candidate.files

    def draw() -> list[tuple[np.ndarray, list[int]]]:
        with contextlib.closing(candidate.start()) as batches:  # type: ignore[type-var]
            drawn = itertools.islice(batches, 5 * SPEAKERS // SHAPE.batch_size)
            return [(mel.numpy().copy(), label.tolist()) for mel, label in drawn]

    split = shardprep.open_shards(shards)["train"]
    mels = {int(label): split.read(index) for index, label in enumerate(split.labels)}
    seen: set[int] = set()
    for mel, label in in_own_process(draw, 120):
        assert mel.shape == (4, 32, 40)
        assert mel.dtype == np.float16
        for segment, own in zip(mel, label, strict=True):
            assert is_segment_of(segment, mels[own])
        seen.update(label)
    assert seen == set(range(SPEAKERS))


def loader(name: str, kind: str, rate: float) -> LoaderResult:
    return LoaderResult(name, kind, 0, rate, rate * 1e-5, [rate], None, 1.0)


LOADERS = [
    loader("files, 0 workers", "files", 5.0),
    loader("files, 2 workers", "files", 10.0),
    loader("webdataset .npy, 0 workers", "webdataset", 8.0),
    loader("webdataset .npy.zst, 0 workers", "webdataset", 4.0),
    loader("webdataset .npy.zst, 2 workers", "webdataset", 6.0),
    loader("litdata, 0 workers", "litdata", 20.0),
    loader("datasets bytes, 0 workers", "datasets", 50.0),
    loader("shardprep none, one process", "shardprep", 400.0),
    loader("shardprep zstd, one process", "shardprep", 60.0),
    loader("limit: gather from memory", "limit", 800.0),
]


def test_ratios_are_to_the_best_of_each_kind() -> None:
    assert bench_loader.ratios(LOADERS) == {
        "ours_to_files": 40.0,
        "ours_to_best_peer": 8.0,
        "best_peer": "datasets bytes, 0 workers",
        "ours_to_best_advised_peer": 20.0,
        "best_advised_peer": "litdata, 0 workers",
        "ours_to_limit": 0.5,
        "zstd_to_webdataset_zst": 10.0,
    }
    alone = bench_loader.ratios([loader("shardprep none, one process", "shardprep", 1.0)])
    assert set(alone.values()) == {None}


def test_names_of_set_ups_that_are_not_advised_exist() -> None:
    assert set(peers.NOT_ADVISED) <= {peer.name for peer in peers.PEERS}


def run(*words: object) -> Any:
    arguments = [str(word) for word in (*words, "--rounds", 1, "--seconds", 0.05)]
    return CliRunner().invoke(bench_loader.main, arguments, catch_exceptions=False)


def test_a_peer_that_fails_is_named_and_the_others_are_measured(
    make_dataset: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("cannot do that")

    good = next(peer for peer in peers.PEERS if peer.name == "webdataset .npy")
    cannot_write = replace(good, name="cannot write", format="a", convert=broken)
    cannot_read = replace(good, name="cannot read", format="b", start=broken)
    absent = replace(good, name="absent", format="c", module="no_such_module")
    monkeypatch.setattr(bench_loader, "PEERS", (cannot_write, cannot_read, absent, good))
    out, work = tmp_path / "out.json", tmp_path / "work"
    done = run("--dataset", make_dataset(), "--work", work, "--out", out)
    result = json.loads(out.read_text())
    assert result["skipped"] == {"absent": "not installed"}
    assert result["failed"] == {
        "cannot write": "converting: ValueError: cannot do that",
        "cannot read, 0 workers": "ValueError: cannot do that",
        "cannot read, 2 workers": "ValueError: cannot do that",
    }
    assert [row["name"] for row in result["loaders"]] == [
        *("files, 0 workers", "files, 2 workers"),
        *("webdataset .npy, 0 workers", "webdataset .npy, 2 workers"),
        *("shardprep none, one process", "shardprep zstd, one process"),
        "limit: gather from memory",
    ]
    assert {"cpu", "cores", "date", "versions", "rounds", "ratios", "conversion_s"} <= set(result)
    assert {"torch", "numpy", "webdataset"} <= set(result["versions"])
    assert "skipped: absent: not installed" in done.stderr
    assert "| webdataset .npy, 2 workers |" in done.stdout


def test_what_is_converted_is_used_again_until_the_data_change(
    make_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    work, tar = tmp_path / "work", tmp_path / "work" / "webdataset-npy" / "000000.tar"
    for name, seed, made_again in (("a", 0, True), ("a", 0, False), ("b", 1, True)):
        if not (tmp_path / name).exists():
            make_dataset(name, seed=seed)
        before = tar.stat().st_mtime_ns if tar.exists() else None
        options = ("--only", "webdataset", "--work", work)
        run("--dataset", tmp_path / name, *options)
        assert (tar.stat().st_mtime_ns != before) == made_again


def test_a_data_set_is_synthesised_with_the_lengths_asked_for(tmp_path: Path) -> None:
    lengths = tmp_path / "lengths.txt"
    lengths.write_text("".join(f"{20 + number % 5}\n" for number in range(60)))
    dataset = bench_loader.synthesise(tmp_path, 0, lengths)
    speakers = json.loads((dataset / "metadata.json").read_text())["speakers"]
    made = [entry["mel_len"] for entries in speakers.values() for entry in entries]
    assert sorted(made) == sorted(20 + number % 5 for number in range(60))


def test_the_picture_shows_each_loader_once_with_its_best_number_of_workers(
    tmp_path: Path,
) -> None:
    rows = [
        {"name": row.name, "kind": row.kind, "samples_per_s": row.samples_per_s} for row in LOADERS
    ]
    best = bench_plot.best_by_loader(rows)
    assert [(row["name"], row["samples_per_s"]) for row in best] == [
        ("webdataset .npy.zst, 2 workers", 6.0),
        ("webdataset .npy, 0 workers", 8.0),
        ("files, 2 workers", 10.0),
        ("litdata, 0 workers", 20.0),
        ("datasets bytes, 0 workers", 50.0),
        ("shardprep zstd, one process", 60.0),
        ("shardprep none, one process", 400.0),
    ]
    pytest.importorskip("matplotlib")
    about = {"cpu": "X", "cores": 2, "date": "2026-01-01", "rounds": 3, "dtype": "float16"}
    result = {**about, "dataset": {"utterances": 9}, "batch": [4, 8, 7], "loaders": rows}
    bench_plot.draw(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
