"""A finished set is up to date exactly if the files hold what it was built from."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from shardprep import BuildError, BuildOptions, build_shards, open_shards, verify_shards
from shardprep.build.pools.pool import ProgressListener
from shardprep.errors import StorageError
from shardprep.format import codecs
from shardprep.source.dataset import scan_dataset
from shardprep.storage import connections

Build = Callable[..., Any]
Contents = Callable[[Path], dict[str, str]]
TIMES = "source-times.npy"
URL = "memory://finished/shards"


@pytest.fixture
def source(make_dataset: Callable[..., Path]) -> Path:
    return make_dataset(speakers=3, utterances=8, test_utterances=5)


@pytest.fixture
def memory() -> Iterator[None]:
    yield
    fsspec.filesystem("memory").store.clear()
    connections.forget_connections()


class Notes(ProgressListener):
    """Keeps the notes, and counts the utterances that were read."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.read = 0

    def note(self, text: str) -> None:
        self.notes.append(text)

    def advance(self, utterances: int, nbytes: int) -> None:
        self.read += utterances


def rebuild(source: Path | str, shards: Path | str, **options: Any) -> Notes:
    """Build into a finished set of the same data set; what was told and read."""
    notes = Notes()
    report = build_shards(source, shards, BuildOptions(workers=1, **options), notes)
    assert report.up_to_date
    assert report.utterances_read == notes.read
    return notes


def scaled(source: Path, to: Path, times: bool = True) -> Path:
    """A copy with other numbers: the same names, lengths and sizes, and the same times if asked."""
    shutil.copytree(source, to)
    for path in to.glob("*.pt"):
        stat = path.stat()
        torch.save(torch.load(path) * 0.25, path)
        assert path.stat().st_size == stat.st_size
        if times:
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return to


def test_nothing_is_read_while_the_files_look_as_they_did(source: Path, tmp_path: Path) -> None:
    build_shards(source, tmp_path / "shards", BuildOptions(workers=1))
    notes = rebuild(source, tmp_path / "shards")
    assert (notes.read, notes.notes) == (0, [])


@pytest.mark.parametrize("times", ["kept", "newer", "older", "one for all"])
@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_other_features_of_the_same_names_and_sizes_are_refused_whatever_their_times(
    source: Path, tmp_path: Path, contents: Contents, codec: Any, times: str
) -> None:
    if times == "one for all":
        # As an archive has it that is packed reproducibly.
        for path in source.iterdir():
            os.utime(path, (1.6e9, 1.6e9))
    shards = tmp_path / "shards"
    build_shards(source, shards, BuildOptions(workers=1, codec=codec))
    other = scaled(source, tmp_path / "normalised")
    if times in ("newer", "older"):
        for path in other.iterdir():
            os.utime(path, (9e9 if times == "newer" else 1.6e9,) * 2)
    before = contents(shards)
    message = (
        r"29 of 29 files of the data set are not those that the set was built from, such as uttr-"
    )
    with pytest.raises(BuildError, match=message) as caught:
        build_shards(other, shards, BuildOptions(workers=1, codec=codec))
    assert caught.value.exit_code == 5
    assert "verify --against" in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert contents(shards) == before
    assert not rebuild(source, shards, codec=codec).notes
    build_shards(other, shards, BuildOptions(workers=1, codec=codec, overwrite=True))
    assert verify_shards(shards, against=other).intact
    assert rebuild(other, shards, codec=codec).read == 0


def test_one_changed_file_is_named_and_only_it_is_read(source: Path, tmp_path: Path) -> None:
    build_shards(source, tmp_path / "shards", BuildOptions(workers=1))
    path = sorted(source.glob("*.pt"))[3]
    torch.save(torch.load(path) * 0.9, path)
    notes = Notes()
    with pytest.raises(BuildError, match=f"1 of 29 files of the data set .* such as {path.name}"):
        build_shards(source, tmp_path / "shards", BuildOptions(workers=1), notes)
    assert notes.read == 1
    assert notes.notes == [
        "1 of 29 files of the data set may have changed since the set was built, by their times; "
        "comparing their contents"
    ]


def test_a_copy_is_read_once_and_then_known(
    source: Path, tmp_path: Path, contents: Contents
) -> None:
    shards = tmp_path / "shards"
    build_shards(source, shards, BuildOptions(workers=1))
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    before, times = contents(shards), (shards / TIMES).read_bytes()
    first = rebuild(copy, shards)
    assert first.read == 29
    assert len(first.notes) == 1
    assert rebuild(copy, shards).read == 0
    assert contents(shards) == before
    assert (shards / TIMES).read_bytes() != times
    # The other folder has the same contents, too.
    assert rebuild(source, shards).read == 29


@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"x" * path.stat().st_size),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: (path.unlink(), os.mkfifo(path)),
    ],
    ids=["missing", "empty", "nonsense", "folder", "pipe"],
)
def test_without_the_times_all_files_are_read(
    source: Path, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    shards = tmp_path / "shards"
    build_shards(source, shards, BuildOptions(workers=1))
    damage(shards / TIMES)
    assert rebuild(source, shards).read == 29
    with pytest.raises(BuildError, match="29 of 29 files of the data set are not those"):
        build_shards(scaled(source, tmp_path / "other"), shards, BuildOptions(workers=1))


def test_what_cannot_be_remembered_is_a_note(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = tmp_path / "shards"
    build_shards(source, shards, BuildOptions(workers=1))
    (shards / TIMES).unlink()

    def refuse(path: Path, data: bytes) -> None:
        raise StorageError("Read-only file system", file=path)

    monkeypatch.setattr("shardprep.build.existing.finished.publish_bytes", refuse)
    report = build_shards(source, shards, BuildOptions(workers=1))
    assert report.up_to_date
    (note,) = report.notes
    assert "compare these files again" in note
    assert "Read-only file system" in note


def test_the_times_are_of_this_data_set_alone_and_no_part_of_the_set(
    source: Path, tmp_path: Path, contents: Contents
) -> None:
    shards, twin = tmp_path / "shards", tmp_path / "twin"
    build_shards(source, shards, BuildOptions(workers=1))
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    build_shards(copy, twin, BuildOptions(workers=1))
    assert contents(shards) == contents(twin)
    assert (shards / TIMES).read_bytes() != (twin / TIMES).read_bytes()
    (shards / TIMES).unlink()
    assert verify_shards(shards, deep=True).intact
    numbers = np.load(twin / TIMES)
    scanned = scan_dataset(copy)
    assert numbers[:4].tobytes().hex() == open_shards(twin).manifest.source_fingerprint
    by_key = sorted(scanned.utterances, key=lambda utterance: utterance.key)
    assert numbers[8:].tolist() == [utterance.version for utterance in by_key]
    assert len(set(numbers.tolist())) == 37


def test_a_file_that_was_left_out_and_is_right_now_is_a_change(
    source: Path, tmp_path: Path
) -> None:
    path = sorted(source.glob("*.pt"))[0]
    good = path.read_bytes()
    path.write_bytes(b"x" * len(good))
    options: dict[str, Any] = {"on_error": "skip"}
    build_shards(source, tmp_path / "shards", BuildOptions(workers=1, **options))
    os.utime(path)
    assert rebuild(source, tmp_path / "shards", **options).read == 1
    path.write_bytes(good)
    with pytest.raises(BuildError, match=f"1 of 29 files of the data set .* such as {path.name}"):
        build_shards(source, tmp_path / "shards", BuildOptions(workers=1, **options))


def test_another_release_of_zstandard_is_no_other_source(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = BuildOptions(workers=1, codec="zstd")
    build_shards(source, tmp_path / "shards", options)
    (tmp_path / "shards" / TIMES).unlink()
    encode = codecs.encode

    def other(mel: np.ndarray, codec: Any) -> bytes:
        return encode(mel, type(codec)("zstd", 19, codec.chunk_frames))

    monkeypatch.setattr(codecs, "encode", other)
    assert build_shards(source, tmp_path / "shards", options).up_to_date
    changed = scaled(source, tmp_path / "changed")
    with pytest.raises(BuildError, match="29 of 29 files of the data set are not those"):
        build_shards(changed, tmp_path / "shards", options)


@pytest.mark.usefixtures("memory")
def test_a_set_behind_a_url_remembers_too(source: Path, tmp_path: Path) -> None:
    build_shards(source, URL, BuildOptions(workers=1))
    assert f"/finished/shards/{TIMES}" in fsspec.filesystem("memory").store
    assert rebuild(source, URL).read == 0
    path = sorted(source.glob("*.pt"))[0]
    os.utime(path, (1.6e9, 1.6e9))
    assert rebuild(source, URL).read == 1
    assert rebuild(source, URL).read == 0
    with pytest.raises(BuildError, match="29 of 29 files of the data set are not those"):
        build_shards(scaled(source, tmp_path / "other"), URL, BuildOptions(workers=1))


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("says", [{}, {"ETag": "one"}, {"LastModified": "2026-01-01"}])
def test_a_source_behind_a_url_is_known_by_its_tags_or_read_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: dict[str, Any]
) -> None:
    from shardprep.storage.remote import Remote

    system = fsspec.filesystem("memory")
    url, says = "memory://finished/Dataset", dict(says)
    for path in source.iterdir():
        system.put_file(str(path), f"{url}/{path.name}")
    info, listing = Remote.info, Remote.listing

    def only(found: dict[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in found.items() if name in ("name", "size", "type")}
        return kept | says

    monkeypatch.setattr(Remote, "info", lambda self: only(info(self)))
    monkeypatch.setattr(
        Remote, "listing", lambda self: {k: only(v) for k, v in listing(self).items()}
    )
    build_shards(url, tmp_path / "shards", BuildOptions(workers=1))
    known = "ETag" in says
    assert rebuild(url, tmp_path / "shards").read == (0 if known else 29)
    # The store's word is told as such.
    (*notes,) = build_shards(url, tmp_path / "shards", BuildOptions(workers=1)).notes
    assert any("verify DST --against SRC" in note for note in notes) == known
    name = next(path for path in system.store if path.endswith(".pt"))
    local = source / name.rpartition("/")[2]
    torch.save(torch.load(local) * 0.5, local)
    system.put_file(str(local), name)
    if known:
        says["ETag"] = "two"
    with pytest.raises(BuildError, match=f"1 of 29 files of the data set .* such as {local.name}"):
        build_shards(url, tmp_path / "shards", BuildOptions(workers=1))


def interrupted(source: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave an unfinished build with all shards of `source`."""
    with monkeypatch.context() as patch:

        def stop(*arguments: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr("shardprep.build.writer.publish_indexes", stop)
        with pytest.raises(KeyboardInterrupt):
            build_shards(source, shards, BuildOptions(workers=1, samples_per_shard=4))


def test_a_resumed_build_mixes_no_other_features_of_the_same_times_in(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contents: Contents
) -> None:
    shards = tmp_path / "shards"
    interrupted(source, shards, monkeypatch)
    other = scaled(source, tmp_path / "other")
    # In place, as rsync and unzip put it.
    for path in other.glob("*.pt"):
        shutil.copy2(path, source / path.name)
    report = build_shards(source, shards, BuildOptions(workers=1, samples_per_shard=4))
    assert report.shards_kept == 0
    assert verify_shards(shards, against=other).intact


def test_a_resumed_build_keeps_no_shard_of_files_that_nobody_knows(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shardprep.source import listing

    shards = tmp_path / "shards"
    unknown = sorted(source.glob("*.pt"))[0]
    plain = listing.FolderListing.look

    def look(self: Any, relative: str) -> Any:
        found = plain(self, relative)
        return found._replace(version=0) if relative == unknown.name else found

    monkeypatch.setattr(listing.FolderListing, "look", look)
    interrupted(source, shards, monkeypatch)
    torch.save(torch.load(unknown) * 0.5, unknown)
    report = build_shards(source, shards, BuildOptions(workers=1, samples_per_shard=4))
    total = sum(split.shards for split in report.splits.values())
    assert report.shards_kept == total - 1
    assert verify_shards(shards, against=source).intact


def test_a_repair_takes_nothing_from_other_features(
    source: Path, tmp_path: Path, contents: Contents
) -> None:
    from shardprep import repair_shards

    shards = tmp_path / "shards"
    build_shards(source, shards, BuildOptions(workers=1))
    other = scaled(source, tmp_path / "other")
    row = np.load(shards / "split=train.index.npy")[0]
    data = bytearray((shards / "train-000000.tar").read_bytes())
    data[int(row["offset"]) + 200] ^= 1
    (shards / "train-000000.tar").write_bytes(data)
    before = contents(shards)
    report = repair_shards(shards, source=other)
    assert not report.intact
    assert any("is not the file that the set was built from" in note for note in report.notes)
    assert contents(shards) == before
    # The index is gone too: the shard is built again, but not taken.
    (shards / "split=train.index.npy").write_bytes(b"")
    before = contents(shards)
    report = repair_shards(shards, source=other, workers=1)
    assert not report.intact
    assert any("has other bytes than before" in note for note in report.notes)
    assert contents(shards) == before


def test_the_cli_says_why_it_reads(
    source: Path, tmp_path: Path, run_cli: Callable[..., Any]
) -> None:
    assert run_cli("build", source, tmp_path / "shards", "--workers", 1).returncode == 0
    copy = shutil.copytree(source, tmp_path / "copy")
    done = run_cli("build", copy, tmp_path / "shards", "--workers", 1)
    assert done.returncode == 0
    assert "up to date, nothing to do" in done.stdout
    assert "note: 29 of 29 files of the data set may have changed" in done.stderr
    other = scaled(source, tmp_path / "other")
    done = run_cli("build", other, tmp_path / "shards", "--workers", 1)
    assert done.returncode == 5
    assert "29 of 29 files of the data set are not those that the set was built from" in done.stderr
