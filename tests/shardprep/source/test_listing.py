"""The files of a data set are listed and read within limits; the machine's trouble is no fault."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from shardprep import BuildReport, SourceError, StorageError
from shardprep.source.dataset import scan_dataset
from shardprep.source.listing import StoreListing
from shardprep.storage.connections import forget_connections
from shardprep.storage.remote import Remote


def test_no_more_bytes_are_read_of_a_store_than_a_file_may_have() -> None:
    store = fsspec.filesystem("memory")
    store.pipe("/data/metadata.json", b"x" * 100)
    files = StoreListing(Remote("memory://data"))
    assert files.read("metadata.json", 100) == b"x" * 100
    with pytest.raises(OSError, match="more than 99 bytes"):
        files.read("metadata.json", 99)
    assert (files.size("metadata.json"), files.count()) == (100, 1)
    with pytest.raises(FileNotFoundError):
        files.size("mapping.json")
    store.store.clear()
    forget_connections()


MACHINE = (errno.EACCES, errno.EPERM, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
MACHINE += (errno.ETIMEDOUT, errno.EIO, errno.ENODEV, errno.EINVAL, errno.EHOSTDOWN)


@pytest.mark.parametrize("code", MACHINE, ids=lambda code: errno.errorcode[code])
@pytest.mark.parametrize(
    ("call", "suffix"),
    [
        ("lstat", ".pt"),
        ("open", ".pt"),
        ("open", "metadata.json"),
        ("open", "mapping.json"),
        ("open", "testdata.json"),
        ("stat", "metadata.json"),
        ("stat", "mapping.json"),
        ("stat", "testdata.json"),
    ],
)
def test_a_file_that_the_machine_cannot_read_is_no_reject(
    make_dataset: Callable[..., Path],
    build: Callable[..., BuildReport],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    call: str,
    suffix: str,
) -> None:
    source = make_dataset(speakers=2, utterances=3, test_utterances=1)
    refused = next(path for path in sorted(source.iterdir()) if path.name.endswith(suffix))
    original = getattr(os, call)

    def refuse(path: Any, *arguments: Any, **options: Any) -> Any:
        if str(path) == str(refused):
            raise OSError(code, os.strerror(code), str(path))
        return original(path, *arguments, **options)

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(StorageError, match=f"{refused.name}: .*{os.strerror(code)}"):
        build(source, tmp_path / "shards", on_error="skip", workers=1)
    assert not list((tmp_path / "shards").glob("[!.]*"))
    monkeypatch.undo()
    assert not build(source, tmp_path / "shards", on_error="skip", workers=1).rejects


def test_a_file_of_a_wrong_kind_stays_a_fault_of_the_data_set(
    make_dataset: Callable[..., Path],
) -> None:
    source = make_dataset(speakers=1, utterances=2, test_utterances=0)
    (source / "mapping.json").unlink()
    os.mkfifo(source / "mapping.json")
    with pytest.raises(SourceError, match="not a regular file"):
        scan_dataset(source)
