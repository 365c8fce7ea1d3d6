"""What the tests of loaders share."""

from __future__ import annotations

import pytest

from tests.conftest import PATIENCE


@pytest.fixture(autouse=True)
def threads_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is, a thread that was closed has ended."""
    monkeypatch.setattr("shardprep.load.background._PATIENCE", PATIENCE)
