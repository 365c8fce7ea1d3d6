"""A folder that nobody can look at now is not a folder that does not exist."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import click
import pytest

from shardprep import Remote, StorageError
from shardprep.cli.places import Place


@pytest.mark.parametrize("code", [errno.EACCES, errno.ESTALE, errno.ETIMEDOUT, errno.EIO])
@pytest.mark.parametrize("exists", [True, False])
def test_trouble_of_the_machine_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, exists: bool
) -> None:
    original = os.stat

    def refuse(path: Any, **options: Any) -> os.stat_result:
        if path == tmp_path:
            raise OSError(code, os.strerror(code), str(path))
        return original(path, **options)

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(StorageError, match=os.strerror(code)):
        Place(exists=exists).convert(str(tmp_path), None, None)


def test_folders_and_urls_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert Place().convert(str(tmp_path), None, None) == tmp_path
    assert Place().convert("s3://bucket/a", None, None) == Remote("s3://bucket/a")
    assert Place(exists=False).convert(str(tmp_path / "new"), None, None) == tmp_path / "new"
    for name in ("new", "file"):
        with pytest.raises(click.BadParameter, match=name):
            Place().convert(str(tmp_path / name), None, None)


def test_a_folder_that_may_not_be_read_is_not_wrong_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root may read every folder.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert Place().convert(str(tmp_path), None, None) == tmp_path
