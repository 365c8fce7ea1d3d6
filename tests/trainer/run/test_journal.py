"""metrics.jsonl and the progress on stderr."""

from __future__ import annotations

import fcntl
import json
import os
import struct
import termios
from pathlib import Path

import pytest

from shardprep_trainer.run.journal import MetricsLog, Progress, _on_terminal

RECORD = {
    "event": "train",
    "step": 1200,
    "loss": 1.25,
    "accuracy": 0.5,
    "lr": 1e-3,
    "samples_per_second": 1234.5,
    "waiting": 0.042,
    "network": 0.0,
}


def test_truncating_drops_later_records_and_a_torn_line(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (10, 20, 30):
        log.append({"step": step, "loss": 1 / 3})
    whole = log.path.read_text().splitlines(keepends=True)
    with log.path.open("a") as file:
        file.write('{"step": 2')
    log.truncate(20)
    assert log.path.read_text() == "".join(whole[:2])
    log.append({"step": 30, "loss": 1 / 3})
    assert log.path.read_text() == "".join(whole)
    log.truncate(0)
    assert log.path.read_text() == ""


@pytest.mark.parametrize(
    "line", [b"5", b"null", b"[1]", b'"step"', b"{}", b'{"step": "5"}', b"\xff\xfe", b"[" * 9999]
)
def test_truncating_drops_what_is_no_record(tmp_path: Path, line: bytes) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 10, "note": "a\u2028b"})
    whole = log.path.read_bytes()
    log.path.write_bytes(line + b"\n" + whole + line + b"\n")
    log.truncate(20)
    assert log.path.read_bytes() == whole


def test_truncating_without_a_file_makes_none(tmp_path: Path) -> None:
    MetricsLog(tmp_path / "metrics.jsonl").truncate(5)
    assert list(tmp_path.iterdir()) == []


def test_every_record_is_one_line_of_json(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(RECORD)
    log.append({"step": 2, "grad_norm": None})
    lines = log.path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [RECORD, {"step": 2, "grad_norm": None}]


def test_without_a_terminal_a_line_an_event_tells_all(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 7.0)
    progress = Progress(5000, 1000, enabled=True)
    progress.advance()
    progress.show(RECORD)
    progress.say("hello")
    progress.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "step 1,200/5,000: loss 1.2500, accuracy 0.500, lr 1.00e-03, 1,234 samples/s, "
        "waiting 4%, 00:00 left\nhello\n"
    )


def test_a_line_tells_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 500.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    progress = Progress(5000, 1000, enabled=True)
    now += 100.0  # 200 steps, so half a second each
    progress.show(RECORD)
    now += 800.0  # 2,000 steps in 900 s; 2,000 are left
    progress.show(RECORD | {"step": 3000})
    progress.show(RECORD | {"step": 5000})
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("waiting 4%")[2] for line in lines] == [
        ", 31:40 left",
        ", 15:00 left",
        "",
    ]


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(5000, 0, enabled=False)
    progress.advance()
    progress.show(RECORD)
    progress.say("hello")
    progress.close()
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_a_bar_carries_the_figures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardprep_trainer.run.journal._on_terminal", lambda: True)
    progress = Progress(2000, 1199, enabled=True)
    progress.advance()
    progress.show(RECORD)
    progress.say("hello")
    progress.close()
    err = capsys.readouterr().err
    assert "1200/2000" in err
    assert "loss 1.2500, accuracy 0.500" in err
    assert "hello\n" in err


def test_a_terminal_that_knows_no_width_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    leader, terminal = os.openpty()
    with os.fdopen(terminal, "w") as stream, os.fdopen(leader):
        monkeypatch.setattr("sys.stderr", stream)
        for columns, bar in ((0, False), (120, True)):
            size = struct.pack("HHHH", 40, columns, 0, 0)
            fcntl.ioctl(stream.fileno(), termios.TIOCSWINSZ, size)
            assert _on_terminal() is bar
