"""The files of a data set in a store, listed and read within limits."""

from __future__ import annotations

import fsspec
import pytest

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
