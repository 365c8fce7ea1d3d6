"""What a user names gives the right tars, each once and in order, with the right splits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shardprep import BuildError, SourceError
from shardprep.build.foreign.tars import find_tars, split_of_name


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    for name in ("train/00000.tar", "train/00001.tar", "train/00010.tar", "val/00000.tar"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    for name in ("train/00000.parquet", "train/00000_stats.json", "train/._00000.tar"):
        (root / name).touch()
    (root / ".hidden").mkdir()
    (root / ".hidden" / "x.tar").touch()
    return root


def found(root: Path, *named: str, **options: object) -> list[tuple[str, str]]:
    tars = find_tars(named, root / "set", **options)  # type: ignore[arg-type]
    return [(os.path.relpath(tar.shown, root), tar.split) for tar in tars]


TRAIN = [(f"train/{number:05d}.tar", "train") for number in (0, 1, 10)]
VAL = [("val/00000.tar", "val")]


def test_folders_patterns_and_globs_name_the_same_tars(
    tars: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tars)
    assert found(tars, ".") == TRAIN + VAL
    assert found(tars, "train", "val") == TRAIN + VAL
    assert found(tars, "train/{00000..00001}.tar", "train/00010.tar") == TRAIN
    assert found(tars, "train/0000{0,1}.tar") == TRAIN[:2]
    assert found(tars, str(tars / "*" / "*.tar")) == TRAIN + VAL
    assert found(tars, "train", "train/00000.tar", str(tars / "train")) == TRAIN


def test_options_decide_the_split_before_names_do(tars: Path) -> None:
    train, val = str(tars / "train"), str(tars / "val")
    assert set(found(tars, train, val, split="test")) == {(n, "test") for n, _ in TRAIN + VAL}
    held = [("train/00010.tar", "val")]
    assert found(tars, train, val=[f"{train}/00010.tar"]) == held + TRAIN[:2]
    # By a link, too: it is the same tar.
    (tars / "link.tar").symlink_to(tars / "train/00010.tar")
    assert found(tars, train, val=[str(tars / "link.tar")]) == [("link.tar", "val"), *TRAIN[:2]]
    assert found(tars, train, test=[f"{train}/{{00000..00001}}.tar"])[:2] == [
        ("train/00000.tar", "test"),
        ("train/00001.tar", "test"),
    ]


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("x/mels-train-000.tar", "train"),
        ("x/TRAIN0.tar", "train"),
        ("x/validation_01.tar", "val"),
        ("dev/00000.tar", "val"),
        ("test/valid.0.tar", "val"),
        ("test/00000.tar", "test"),
        ("latest/contest.tar", "train"),
        ("devices/evaluate.tar", "train"),
    ],
)
def test_words_in_names_say_the_split(path: str, split: str) -> None:
    assert split_of_name(path) == split


def test_names_that_say_two_splits_are_refused_unless_an_option_decides(tmp_path: Path) -> None:
    path = tmp_path / "train-and-test.tar"
    path.touch()
    with pytest.raises(BuildError, match="two splits, test and train"):
        find_tars([path], tmp_path / "set")
    assert find_tars([path], tmp_path / "set", val=[path])[0].split == "val"
    assert find_tars([path], tmp_path / "set", split="test")[0].split == "test"


@pytest.mark.parametrize(
    ("name", "error", "what"),
    [
        ("nowhere.tar", SourceError, "does not exist"),
        ("train/{00000..00002}.tar", SourceError, "train/00002.tar: does not exist"),
        ("none/*.tar", SourceError, "does not exist"),
        ("train/{00000.tar", SourceError, "is no brace pattern"),
        ("empty", SourceError, "there is no tar"),
        ("s3://bucket/{0..9}.tar", BuildError, "lies behind a URL"),
    ],
)
def test_what_is_not_there_is_named(
    tars: Path, name: str, error: type[Exception], what: str
) -> None:
    (tars / "empty").mkdir()
    with pytest.raises(error, match=what):
        find_tars([name if "://" in name else tars / name], tars / "set")


@pytest.mark.parametrize("name", ["0.tar.gz", "0.TAR.ZST", "0.tgz", "0.tar.xz"])
def test_compressed_tars_are_refused_with_the_remedy(tars: Path, name: str) -> None:
    (tars / "train" / name).touch()
    for named in (tars, tars / "train" / name):
        with pytest.raises(SourceError, match="is compressed.*Decompress it"):
            find_tars([named], tars / "set")


def test_a_set_is_never_made_where_its_tars_lie(tars: Path) -> None:
    assert len(find_tars([tars], tars / "val")) == 3
    for named in (tars / "val" / "00000.tar", tars / "val"):
        with pytest.raises(BuildError, match="lies in the folder that is to hold the set"):
            find_tars([named], tars / "val")
