"""The same source, options and seed give the same bytes, and a finished set stays as it is."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shardprep import (
    BuildError,
    BuildOptions,
    BuildReport,
    CorruptShardError,
    FormatError,
    SourceError,
    build_shards,
    open_shards,
    verify_shards,
)
from shardprep.build.pools.pool import ProgressListener

Build = Callable[..., BuildReport]
Contents = Callable[[Path], dict[str, str]]


@pytest.fixture
def source(make_dataset: Callable[..., Path]) -> Path:
    return make_dataset(speakers=3, utterances=9, test_utterances=4)


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_workers_do_not_change_the_bytes(
    source: Path, tmp_path: Path, build: Build, contents: Contents, codec: str
) -> None:
    for workers in (1, 2):
        build(source, tmp_path / str(workers), codec=codec, workers=workers, samples_per_shard=4)
    assert len(contents(tmp_path / "1")) > 8
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_order_of_the_metadata_and_times_of_files_do_not_change_the_shards(
    source: Path, tmp_path: Path, build: Build, contents: Contents
) -> None:
    build(source, tmp_path / "one")
    metadata = json.loads((source / "metadata.json").read_text())
    turned = {name: own[::-1] for name, own in reversed(metadata["speakers"].items())}
    (source / "metadata.json").write_text(json.dumps({**metadata, "speakers": turned}))
    for path in source.glob("*.pt"):
        path.touch()
    build(source, tmp_path / "two")
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    # The fingerprint of the source in the manifest depends on the order of the metadata.
    assert one.pop("manifest.json") != two.pop("manifest.json")
    assert one == two


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"dtype": "float32"}, {"codec": "zstd"}, {"val_fraction": 0.3}]
)
def test_options_change_the_bytes(
    source: Path, tmp_path: Path, build: Build, contents: Contents, change: dict[str, object]
) -> None:
    build(source, tmp_path / "one")
    build(source, tmp_path / "two", **change)
    name = "train-000000.tar"
    assert contents(tmp_path / "one")[name] != contents(tmp_path / "two")[name]


def test_report_counts_what_was_packed(source: Path, tmp_path: Path, build: Build) -> None:
    report = build(source, tmp_path / "shards", samples_per_shard=4)
    shard_set = open_shards(tmp_path / "shards")
    for name, split in shard_set.items():
        totals = report.splits[name]
        tars = list((tmp_path / "shards").glob(f"{name}-*.tar"))
        assert (totals.samples, totals.frames) == (len(split), split.frames.sum())
        assert totals.shards == len(tars)
        assert totals.bytes == sum(path.stat().st_size for path in tars)
    assert report.utterances_read == 31
    assert report.source_bytes == sum(path.stat().st_size for path in source.glob("*.pt"))
    assert (report.speakers, report.rejects, report.up_to_date) == (3, [], False)


@pytest.mark.parametrize("workers", [1, 2])
def test_listener_is_told_of_every_utterance_and_byte(
    source: Path, tmp_path: Path, workers: int
) -> None:
    class Listener(ProgressListener):
        total = seen = (0, 0)
        closed = 0

        def start(self, utterances: int, nbytes: int) -> None:
            self.total = utterances, nbytes

        def advance(self, utterances: int, nbytes: int) -> None:
            self.seen = self.seen[0] + utterances, self.seen[1] + nbytes

        def close(self) -> None:
            self.closed += 1

    listener = Listener()
    options = BuildOptions(workers=workers, samples_per_shard=5)
    build_shards(source, tmp_path / "shards", options, listener)
    assert listener.seen == listener.total
    assert listener.total[0] == 31
    assert listener.closed == 1


def test_no_split_val_when_the_fraction_is_zero(source: Path, tmp_path: Path, build: Build) -> None:
    build(source, tmp_path / "shards", val_fraction=0)
    assert open_shards(tmp_path / "shards").splits == ("train", "test")
    assert not list((tmp_path / "shards").glob("val*"))


def test_test_split_is_in_the_order_of_testdata(source: Path, tmp_path: Path, build: Build) -> None:
    build(source, tmp_path / "shards", samples_per_shard=2)
    testdata = json.loads((source / "testdata.json").read_text())
    keys = [entry["feature_path"].removesuffix(".pt") for entry in testdata["utterances"]]
    split = open_shards(tmp_path / "shards")["test"]
    assert list(split.keys) == keys
    assert set(split.labels) == {-1}


def test_finished_set_is_up_to_date_and_untouched(
    source: Path, tmp_path: Path, build: Build
) -> None:
    shards = tmp_path / "shards"
    first = build(source, shards)
    before = {path: path.stat() for path in shards.iterdir()}
    again = build(source, shards, workers=2)
    assert again.up_to_date
    assert again.splits == first.splits
    assert again.utterances_read == 0
    for path, stat in before.items():
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)


def test_rejects_of_a_finished_set_are_reported_again(
    source: Path, tmp_path: Path, build: Build
) -> None:
    next(source.glob("*.pt")).write_bytes(b"garbage")
    first = build(source, tmp_path / "shards", on_error="skip")
    again = build(source, tmp_path / "shards", on_error="skip")
    assert again.up_to_date
    assert again.rejects == first.rejects
    assert len(first.rejects) == 1


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_finished_set_with_a_lost_file_is_not_up_to_date(
    source: Path, tmp_path: Path, build: Build, contents: Contents, damage: str
) -> None:
    shards = tmp_path / "shards"
    build(source, shards)
    before, shard = contents(shards), shards / "train-000000.tar"
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(BuildError, match=r"train-000000\.tar .*Give --overwrite"):
        build(source, shards)
    build(source, shards, overwrite=True)
    assert contents(shards) == before


def test_other_options_or_source_need_overwrite(
    source: Path, tmp_path: Path, build: Build, contents: Contents
) -> None:
    shards = tmp_path / "shards"
    build(source, shards, samples_per_shard=2)
    before = contents(shards)
    with pytest.raises(
        BuildError, match=r"with other options \(samples_per_shard 2, not 9\).*--over"
    ):
        build(source, shards, samples_per_shard=9)
    changes = (
        r"built with other options \(codec none, not zstd; samples_per_shard 2, not 1000; seed 0"
    )
    with pytest.raises(BuildError, match=changes):
        build(source, shards, codec="zstd", seed=1)
    assert contents(shards) == before
    build(source, shards, samples_per_shard=9, overwrite=True)
    build(source, tmp_path / "fresh", samples_per_shard=9)
    assert contents(shards) == contents(tmp_path / "fresh")


def test_set_whose_manifest_was_altered_can_be_overwritten(
    source: Path, tmp_path: Path, build: Build, contents: Contents
) -> None:
    shards = tmp_path / "shards"
    build(source, shards)
    before = contents(shards)
    text = (shards / "manifest.json").read_text()
    (shards / "manifest.json").write_text(text.replace("id00000", "id99999"))
    with pytest.raises(FormatError, match="--overwrite"):
        build(source, shards)
    build(source, shards, overwrite=True)
    assert contents(shards) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "foreign", [{"notes.txt": "mine"}, {"train-000000.tar": "mine", "manifest.json": '{"a": 1}'}]
)
def test_foreign_folder_is_refused_and_left_as_it_is(
    source: Path,
    tmp_path: Path,
    build: Build,
    contents: Contents,
    foreign: dict[str, str],
    overwrite: bool,
) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for name, text in foreign.items():
        (shards / name).write_text(text)
    before = contents(shards)
    with pytest.raises((BuildError, FormatError)):
        build(source, shards, overwrite=overwrite)
    assert {name: sha for name, sha in contents(shards).items() if name in foreign} == before
    with pytest.raises(BuildError, match="not empty"):
        build(source, source, overwrite=overwrite)


def test_a_fresh_repository_or_disk_is_a_place_for_a_set(
    source: Path, tmp_path: Path, build: Build, contents: Contents
) -> None:
    shards = tmp_path / "shards"
    (shards / "lost+found").mkdir(parents=True)
    (shards / ".git").mkdir()
    for name in ("README.md", ".gitattributes", ".DS_Store", ".git/config"):
        (shards / name).write_text(name)
    before = contents(shards)
    build(source, shards)
    assert contents(shards).items() >= before.items()
    assert verify_shards(shards).intact
    # A shard without a manifest may be somebody's, and a build would replace it.
    for name in ("train-000000.tar", "rejects.jsonl", "notes.txt"):
        other = tmp_path / name.partition(".")[0]
        other.mkdir()
        (other / name).write_text("mine")
        with pytest.raises(BuildError, match=f"not empty and holds no shards, but {name}"):
            build(source, other)
        assert (other / name).read_text() == "mine"


def test_foreign_files_beside_the_shards_survive_every_build(
    source: Path, tmp_path: Path, build: Build
) -> None:
    shards = tmp_path / "shards"
    build(source, shards)
    foreign = {name: shards / name for name in ("notes.txt", "train.tar", "train-0.tar", "sub")}
    for name, path in foreign.items():
        path.mkdir() if name == "sub" else path.write_text(name)
    build(source, shards, samples_per_shard=2, overwrite=True)
    assert all(path.exists() for path in foreign.values())
    assert foreign["notes.txt"].read_text() == "notes.txt"
    faults = {fault.file for fault in verify_shards(shards).faults}
    # Readers may take these two for shards.
    assert faults == {"train.tar", "train-0.tar"}


@pytest.mark.parametrize("workers", [1, 2])
def test_dry_run_finds_faults_in_the_files_and_writes_nothing(
    source: Path, tmp_path: Path, build: Build, workers: int
) -> None:
    shards = tmp_path / "shards"
    report = build(source, shards, dry_run=True, workers=workers, samples_per_shard=7)
    assert (report.dry_run, report.utterances_read) == (True, 31)
    assert sum(split.samples for split in report.splits.values()) == 31
    bad = next(source.glob("*.pt"))
    bad.write_bytes(b"garbage")
    for on_error in ("fail", "skip"):
        dry = build(source, shards, dry_run=True, workers=workers, on_error=on_error)
        assert [reject.file for reject in dry.rejects] == [bad.name]
    assert not shards.exists()


def test_fault_in_one_file_keeps_the_shards_that_were_finished(
    source: Path, tmp_path: Path, build: Build, contents: Contents
) -> None:
    build(source, tmp_path / "fresh", samples_per_shard=3)
    (bad,) = (source / f"{key}.pt" for key in open_shards(tmp_path / "fresh")["test"].keys[-1:])
    stat, data = bad.stat(), bad.read_bytes()
    bad.write_bytes(b"x" * len(data))
    with pytest.raises(SourceError, match=bad.name):
        build(source, tmp_path / "shards", samples_per_shard=3)
    bad.write_bytes(data)
    report = build(source, tmp_path / "shards", samples_per_shard=3)
    assert report.shards_kept == sum(split.shards for split in report.splits.values()) - 1
    assert contents(tmp_path / "shards") == contents(tmp_path / "fresh")
    assert stat.st_size == bad.stat().st_size


def test_split_with_only_rejects_is_absent(source: Path, tmp_path: Path, build: Build) -> None:
    testdata = json.loads((source / "testdata.json").read_text())
    for entry in testdata["utterances"]:
        (source / entry["feature_path"]).write_bytes(b"garbage")
    build(source, tmp_path / "shards", on_error="skip")
    assert open_shards(tmp_path / "shards").splits == ("train", "val")
    assert not list((tmp_path / "shards").glob("test*"))
    assert verify_shards(tmp_path / "shards", deep=True, against=source).intact


def test_seconds_are_measured(source: Path, tmp_path: Path, build: Build) -> None:
    began = time.monotonic()
    report = build(source, tmp_path / "shards")
    assert 0 < report.seconds <= time.monotonic() - began


def test_speakers_that_rejects_leave_only_in_val_are_named(
    source: Path, tmp_path: Path, build: Build
) -> None:
    options = {"val_fraction": 0.5, "on_error": "skip"}
    build(source, tmp_path / "first", **options)
    train = open_shards(tmp_path / "first")["train"]
    for key in train.keys[train.labels == 1]:
        (source / f"{key}.pt").write_bytes(b"garbage")
    (note,) = build(source, tmp_path / "second", **options).notes
    assert note == "these speakers are in val, but not in train: id00001"
    (note,) = build(source, tmp_path / "third", val_fraction=0.0, on_error="skip").notes
    assert "no val split" in note


def test_finished_set_with_a_damaged_list_of_rejects_is_named(
    source: Path, tmp_path: Path, build: Build
) -> None:
    sorted(source.glob("*.pt"))[0].write_bytes(b"garbage")
    build(source, tmp_path / "shards", on_error="skip")
    listing = tmp_path / "shards" / "rejects.jsonl"
    listing.write_bytes(b"x" * len(listing.read_bytes()))
    with pytest.raises(CorruptShardError, match=r"rejects\.jsonl: its sha256 is not the one"):
        build(source, tmp_path / "shards", on_error="skip")
