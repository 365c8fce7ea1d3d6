"""Progress: it passes everything on, is silent without a terminal, and fits into 80 columns."""

from __future__ import annotations

import io
import re
import sys
import time

import pytest

from shardprep_trainer.pretrained.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_nothing_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(iter("abc"), 3, "test", lambda _: 1)) == list("abc")
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_count_rate_and_time_left_in_80_columns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    shown = progress(["x" * 90_000, "x" * 30_000], 120_000, "train", len)
    next(shown)
    # Bars are drawn ten times a second.
    time.sleep(0.15)
    next(shown)
    lines = [line for line in re.split("[\r\n]", terminal.getvalue()) if line]
    assert max(map(len, lines)) <= 80
    assert re.search(r"train: +75%.* 90000/120000 \[[\d:]+<[\d:]+, .*utt/s\]", lines[-1])
    assert list(shown) == []
