"""Tests with other people's training loops, whose packages the extra `loops` brings."""

from __future__ import annotations

import importlib.util
import os

import pytest

PACKAGES = ("lightning", "torchdata", "transformers")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]


@pytest.fixture(autouse=True)
def packages() -> None:
    """Skip without the packages; fail where SHARDPREP_TEST_LOOPS says that they must be there."""
    if MISSING and os.environ.get("SHARDPREP_TEST_LOOPS"):
        pytest.fail(f"not installed: {', '.join(MISSING)}")
    if MISSING:
        pytest.skip("needs pip install 'shardprep[loops]'")
