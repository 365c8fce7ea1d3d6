"""A set of adopted tars reads as `tarfile` and NumPy read the tars, which never change."""

from __future__ import annotations

import errno
import io
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from shardprep import (
    BuildError,
    BuildReport,
    CorruptShardError,
    FormatError,
    SegmentLoader,
    SourceError,
    StorageError,
    UtteranceLoader,
    adopt_shards,
    append_shards,
    open_shards,
    repair_shards,
    stream,
    verify_shards,
)
from shardprep.build.foreign import adopt

Write = Callable[..., Path]
Contents = Callable[[Path], dict[str, str]]


@pytest.fixture
def tars(tmp_path: Path, write_tar: Write) -> Path:
    """As img2dataset names them: three tars of 8 utterances in train/, one in val/."""
    rng = np.random.default_rng(3)
    root = tmp_path / "data"
    number = 0
    for name in ("train/00000.tar", "train/00001.tar", "train/00002.tar", "val/00000.tar"):
        members: list[tuple[str, Any]] = []
        for _ in range(8):
            key = f"{number:09d}"
            mel = rng.normal(size=(int(rng.integers(1, 300)), 40)).astype(np.float16)
            members += [(f"{key}.npy", mel), (f"{key}.txt", b"words")]
            members += [(f"{key}.json", {"speaker": f"s{number % 5}", "url": "u"})]
            number += 1
        write_tar(root / name, members)
        (root / name).with_suffix(".parquet").touch()
    return root


def oracle(*paths: Path) -> dict[str, np.ndarray]:
    """The matrices of tars by key, in order, read without us."""
    found = {}
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.rpartition(".")
                if extension == "npy":
                    data = tar.extractfile(member).read()  # type: ignore[union-attr]
                    found[key] = np.load(io.BytesIO(data))
    return found


def state(root: Path) -> dict[str, tuple[bytes, int, int]]:
    """Bytes, time and mode of every tar of a folder."""
    return {
        str(path): (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_mode)
        for path in sorted(root.rglob("*.tar"))
        if not path.is_symlink()
    }


def test_every_reader_gives_what_the_tars_hold(tars: Path, tmp_path: Path) -> None:
    before = state(tars)
    report = adopt_shards(tars, tmp_path / "set", workers=1)
    assert (report.member, report.dtype, report.n_mels) == ("npy", "float16", 40)
    assert {name: split.samples for name, split in report.splits.items()} == {"train": 24, "val": 8}
    assert verify_shards(tmp_path / "set", deep=True).intact
    shards = open_shards(tmp_path / "set")
    assert shards.speakers == ("s0", "s1", "s2", "s3", "s4")
    for name in ("train", "val"):
        expected = oracle(*sorted((tars / name).glob("*.tar")))
        split = shards[name]
        assert split.keys.tolist() == list(expected)
        assert split.labels.tolist() == [int(key) % 5 for key in expected]
        for index, mel in enumerate(expected.values()):
            assert np.array_equal(split.read(index), mel)
        streamed = list(stream(tmp_path / "set", name))
        assert [one["__key__"] for one in streamed] == list(expected)
        for one in streamed:
            assert np.array_equal(one["mel"], expected[one["__key__"]])
            assert one["speaker"] == f"s{int(one['__key__']) % 5}" == f"s{one['label']}"
        whole = {
            int(index): mel[:length].numpy()
            for batch in UtteranceLoader(split, max_frames=500)
            for index, mel, length in zip(
                batch["index"], batch["mel"], batch["length"], strict=True
            )
        }
        assert all(np.array_equal(whole[n], mel) for n, mel in enumerate(expected.values()))
    matrices = list(oracle(*sorted((tars / "train").glob("*.tar"))).values())
    for batch in SegmentLoader(shards["train"], batch_size=24, shuffle=False, segment_frames=64):
        for mel, expected_mel in zip(batch["mel"].numpy(), matrices, strict=True):
            padded = np.full((64, 40), -20, np.float16)
            padded[: min(64, len(expected_mel))] = expected_mel[:64]
            assert np.array_equal(mel, padded)
    assert state(tars) == before


def test_nothing_of_the_tars_is_copied(tars: Path, tmp_path: Path) -> None:
    adopt_shards(tars, tmp_path / "set", workers=1)
    links = sorted((tmp_path / "set").glob("*.tar"))
    assert [link.name for link in links] == [
        "train-000000.tar",
        "train-000001.tar",
        "train-000002.tar",
        "val-000000.tar",
    ]
    assert all(link.is_symlink() for link in links)
    assert [link.readlink() for link in links] == sorted(tars.rglob("*.tar"))
    own = sum(p.lstat().st_size for p in (tmp_path / "set").iterdir() if not p.is_symlink())
    assert own < 10_000


def test_the_index_of_adopted_shards_is_the_one_that_their_build_wrote(
    edge_sets: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    for dtype in ("float16", "float32"):
        built = edge_sets[dtype, "none"]
        report = adopt_shards(built, tmp_path / dtype, workers=1)
        assert report.member == "mel.npy"
        assert not report.notes
        ours, theirs = open_shards(tmp_path / dtype), open_shards(built)
        assert ours.speakers == theirs.speakers
        for name in theirs:
            assert (ours[name].locations == theirs[name].locations).all()
            infos = ours.manifest.splits[name], theirs.manifest.splits[name]
            assert infos[0].shards == infos[1].shards


def test_workers_and_names_of_the_same_tars_do_not_change_the_bytes(
    tars: Path, tmp_path: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tars)
    adopt_shards(tars, tmp_path / "a", workers=1)
    adopt_shards(["train/{00000..00002}.tar", "val"], tmp_path / "b", workers=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_faults_stop_with_the_first_and_count_each_kind(
    tars: Path, tmp_path: Path, write_tar: Write
) -> None:
    mel = np.zeros((2, 40), np.float16)
    bad = [("x.npy", mel[0]), ("y.npy", mel.T.copy()), ("z.npz", b""), ("w.npy", mel[1])]
    write_tar(tars / "train" / "00003.tar", [*bad, ("good.npy", mel), ("good.cls", b"s1")])
    with pytest.raises(SourceError) as caught:
        adopt_shards(tars, tmp_path / "set", workers=1)
    text = str(caught.value)
    assert text.startswith(f"{tars}/train/00003.tar: x: has the shape (40,), expected")
    assert "and 4 more utterances are faulty: 1 like it" in text
    assert "--on-error skip" in text
    with pytest.raises(FormatError):
        open_shards(tmp_path / "set")


def test_skip_leaves_out_what_cannot_be_mapped_and_lists_it(
    tars: Path, tmp_path: Path, write_tar: Write
) -> None:
    mel = np.ones((2, 40), np.float16)
    speaker = {"speaker": "s1"}
    members: list[tuple[str, Any]] = []
    # A key twice in the tar, one of another tar, one that is no matrix, and two good ones.
    for key, matrix in [("b", mel), ("g", mel + 1), ("b", mel), ("000000001", mel), ("x", mel[0])]:
        members += [(f"{key}.npy", matrix), (f"{key}.json", speaker)]
    members += [("h.json", speaker), ("h.npy", mel + 2), ("n.npy.gz", b"x")]
    write_tar(tars / "train" / "00003.tar", members)
    cut = (tars / "val" / "00000.tar").read_bytes()
    (tars / "val" / "00001.tar").write_bytes(cut[:-20_000])
    report = adopt_shards(tars, tmp_path / "set", on_error="skip", workers=1)
    lines = (tmp_path / "set" / "rejects.jsonl").read_bytes().splitlines()
    listed = [msgspec.json.decode(line) for line in lines]
    assert listed == msgspec.to_builtins(report.rejects)
    assert [(line["file"][len(str(tars)) :], line["key"]) for line in listed] == [
        ("/train/00003.tar", "b"),
        ("/train/00003.tar", "x"),
        ("/train/00003.tar", "n"),
        ("/train/00003.tar", "000000001"),
        ("/val/00001.tar", ""),
    ]
    split = open_shards(tmp_path / "set")["train"]
    assert split.keys.tolist()[24:] == ["g", "h"]
    assert np.array_equal(split.read(24), mel + 1)
    assert np.array_equal(split.read(25), mel + 2)
    assert verify_shards(tmp_path / "set", deep=True).intact
    assert [one["__key__"] for one in stream(tmp_path / "set")] == split.keys.tolist()


def test_several_arrays_need_a_choice(tmp_path: Path, write_tar: Write) -> None:
    mel, pitch = np.ones((3, 40), np.float32), np.zeros((3, 1), np.float32)
    path = write_tar(tmp_path / "in" / "a.tar", [("a.mel.npy", mel), ("a.f0.npy", pitch)])
    with pytest.raises(BuildError, match=r"mel.npy, f0.npy. Say which .* --member mel.npy"):
        adopt_shards(path, tmp_path / "set")
    adopt_shards(path, tmp_path / "set", member=".F0.npy", workers=1)
    assert open_shards(tmp_path / "set")["train"].read(0).shape == (3, 1)
    with pytest.raises(BuildError, match=r"only members that end in .npy"):
        adopt_shards(path, tmp_path / "set", member="pth")


def test_tars_without_arrays_are_refused_by_what_they_have(
    tmp_path: Path, write_tar: Write
) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b""), ("a.pth", b""), ("a.npy.gz", b"")])
    with pytest.raises(SourceError, match=r"\.jpg, \.pth \(a pickle\), \.npy\.gz \(compressed\)"):
        adopt_shards(path, tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_the_same_adoption_is_up_to_date_and_any_other_is_refused(
    tars: Path, tmp_path: Path, write_tar: Write, contents: Contents
) -> None:
    adopt_shards(tars, tmp_path / "set", workers=1)
    before = contents(tmp_path / "set")
    assert adopt_shards(tars, tmp_path / "set", workers=1).up_to_date
    assert contents(tmp_path / "set") == before
    write_tar(
        tars / "train" / "9.tar",
        [("n.npy", np.ones((2, 40), np.float16)), ("n.json", {"speaker": "s0"})],
    )
    for change in ({}, {"split": "train"}, {"val": [tars / "train" / "00000.tar"]}):
        with pytest.raises(BuildError, match="give --overwrite"):
            adopt_shards(tars, tmp_path / "set", workers=1, **change)  # type: ignore[arg-type]
    assert contents(tmp_path / "set") == before
    report = adopt_shards(tars, tmp_path / "set", workers=1, overwrite=True)
    assert report.splits["train"].samples == 25
    assert verify_shards(tmp_path / "set", deep=True).intact
    # The index alone is damaged.
    (tmp_path / "set" / "split=val.index.npy").write_bytes(b"")
    with pytest.raises(BuildError, match="is damaged"):
        adopt_shards(tars, tmp_path / "set", workers=1)


def test_a_build_replaces_links_and_an_adoption_replaces_shards(
    tars: Path,
    tmp_path: Path,
    edge_source: Path,
    edge_set: Path,
    build: Callable[..., BuildReport],
    contents: Contents,
) -> None:
    target, before = tmp_path / "set", state(tars)
    adopt_shards(tars, target, workers=1)
    with pytest.raises(BuildError, match="from another source"):
        build(edge_source, target)
    with pytest.raises(BuildError, match="no build made"):
        append_shards(edge_source, target)
    build(edge_source, target, overwrite=True, samples_per_shard=8, val_fraction=0.2)
    assert contents(target) == contents(edge_set)
    assert not any(path.is_symlink() for path in target.iterdir())
    with pytest.raises(BuildError, match="built by `shardprep build`"):
        adopt_shards(tars, target, workers=1)
    adopt_shards(tars, target, workers=1, overwrite=True)
    adopt_shards(tars, tmp_path / "other", workers=1)
    assert contents(target) == contents(tmp_path / "other")
    assert state(tars) == before


PROGRAM = """
import shutil
from shardprep import adopt_shards

DEADLY += [(os, "symlink"), (os, "rename")]

def act(subject, folder):
    adopt_shards(subject, folder, workers=1, overwrite=True)
"""


@pytest.mark.parametrize("first", ["nothing", pytest.param("a set", marks=pytest.mark.slow)])
def test_a_kill_at_any_step_leaves_no_half_set_and_the_same_command_continues(
    tmp_path: Path,
    write_tar: Write,
    edge_set: Path,
    contents: Contents,
    killed_at_every_step: Callable[[str, Path], list[Path]],
    first: str,
) -> None:
    tars = tmp_path / "data"
    for name in ("train", "val"):
        write_tar(tars / f"{name}.tar", [("a.npy", np.ones((3, 40), np.float16))])
    before = state(tars)
    adopt_shards(tars, tmp_path / "expected", workers=1)
    expected, program = contents(tmp_path / "expected"), PROGRAM
    if first == "a set":
        program += (
            f"\ndef prepare(subject, folder):\n    shutil.copytree({str(edge_set)!r}, folder)\n"
        )
    folders = killed_at_every_step(program, tars)
    assert len(folders) > 15
    for folder in folders:
        if (folder / "manifest.json").exists():
            assert verify_shards(folder).intact
        adopt_shards(tars, folder, workers=1, overwrite=True)
        assert contents(folder) == expected
    assert state(tars) == before


def test_what_an_interrupted_adoption_has_read_is_not_read_again(
    tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scanned: list[str] = []
    scan = adopt.scan_tar

    def interrupted(task: Any, advance: Any) -> Any:
        if len(scanned) == 2:
            raise KeyboardInterrupt
        scanned.append(task.path)
        return scan(task, advance)

    monkeypatch.setattr(adopt, "scan_tar", interrupted)
    with pytest.raises(KeyboardInterrupt):
        adopt_shards(tars, tmp_path / "set", workers=1)
    monkeypatch.undo()
    # One of the two is another file by now.
    os.utime(scanned[0], ns=(1, 1))
    report = adopt_shards(tars, tmp_path / "set", workers=1)
    assert report.tars_kept == 1
    assert verify_shards(tmp_path / "set", deep=True).intact


def test_a_tar_that_went_away_or_changed_is_named_when_the_set_is_opened(
    tars: Path, tmp_path: Path
) -> None:
    adopt_shards(tars, tmp_path / "set", workers=1)
    path = tars / "train" / "00001.tar"
    path.rename(tars / "moved")
    with pytest.raises(StorageError, match=r"train-000001.tar.*a link to a file that is not there"):
        open_shards(tmp_path / "set")["train"]
    shutil.copy(tars / "moved", path)
    assert len(open_shards(tmp_path / "set")["train"]) == 24
    with open(path, "ab") as file:
        file.write(bytes(512))
    with pytest.raises(CorruptShardError, match="has .* bytes, expected .* adopt TARS"):
        open_shards(tmp_path / "set")["train"]


def test_damage_is_found_and_a_repair_refuses_to_change_foreign_tars(
    tars: Path, tmp_path: Path, run_cli: Callable[..., Any]
) -> None:
    adopt_shards(tars, tmp_path / "set", workers=1)
    split = open_shards(tmp_path / "set")["train"]
    row = split.locations[10]
    path = tars / "train" / "00001.tar"
    data = bytearray(path.read_bytes())
    data[int(row["offset"]) + 200] ^= 4
    path.chmod(0o644)
    path.write_bytes(data)
    assert [fault.file for fault in verify_shards(tmp_path / "set").faults] == ["train-000001.tar"]
    keys = {fault.key for fault in verify_shards(tmp_path / "set", deep=True).faults}
    assert keys == {"", "000000010"}
    said = run_cli("verify", tmp_path / "set").stderr
    assert "restore the tar" in said
    assert "shardprep repair" not in said
    with pytest.raises(CorruptShardError, match="crc32.*restore the tar"):
        split.read(10)
    with pytest.raises(CorruptShardError, match="crc32.*restore the tar"):
        list(stream(tmp_path / "set"))
    before = state(tars)
    for options in ({"drop": True}, {"source": tars}):
        with pytest.raises(BuildError, match="adopted tars.*restore the tar"):
            repair_shards(tmp_path / "set", **options)  # type: ignore[arg-type]
    assert state(tars) == before


def test_a_disk_without_links_is_said(
    tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: object, **options: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refused)
    with pytest.raises(StorageError, match="makes no symbolic links.*another file system"):
        adopt_shards(tars, tmp_path / "set", workers=1)
    monkeypatch.undo()
    adopt_shards(tars, tmp_path / "set", workers=1)


def test_places_that_cannot_hold_links_are_refused(tars: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="is a URL"):
        adopt_shards(tars, "memory://set")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(BuildError, match="the folder is not empty"):
        adopt_shards(tars, tmp_path / "full", workers=1)


def test_an_adopted_set_is_read_as_one_with_a_built_set(
    edge_sets: dict[tuple[str, str], Path], tmp_path: Path, write_tar: Write
) -> None:
    mel = np.ones((9, 7), np.float16)
    path = write_tar(tmp_path / "in" / "a.tar", [("new.npy", mel), ("new.cls", b"bob")])
    adopt_shards(path, tmp_path / "set", workers=1)
    both = open_shards([edge_sets["float16", "none"], tmp_path / "set"])
    split = both["train"]
    assert np.array_equal(split.read(len(split) - 1), mel)
    assert both.speakers[split.labels[-1]] == "bob"
