"""From a run folder to a prediction: what is loaded on the way, and how often it is parsed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import pytest
import yaml
from click.testing import CliRunner

from shardprep_trainer import embed, export, predict, score
from shardprep_trainer.config import checks

_PREDICT = """
import json, sys
from shardprep_trainer.{name} import main
main({arguments!r}, standalone_mode=False)
print(json.dumps([name for name in sys.modules if name.startswith("shardprep_trainer")]))
"""


@pytest.mark.slow
def test_to_use_a_model_loads_nothing_that_only_training_needs(run: Path, tmp_path: Path) -> None:
    for name, out in (("predict", "x.csv"), ("embed", "x.npz"), ("export", "x.pt")):
        arguments = [str(run), "--out", str(tmp_path / out)]
        code = _PREDICT.format(name=name, arguments=arguments)
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        loaded = json.loads(done.stdout.splitlines()[-1])
        assert f"shardprep_trainer.{name}" in loaded
        rooms = {module.split(".")[1] for module in loaded if "." in module}
        assert not rooms & {"learning", "run", "processes", "train"}, rooms


def _is_ours(frame: FrameType) -> bool:
    # shardprep reads the manifest by the same means.
    return str(frame.f_globals["__name__"]).startswith(("shardprep_trainer", __name__))


def count_parsing(call: Callable[[], object]) -> Counter[str]:
    """How often a call parses a configuration, checks it, and reads what may hold it."""
    ours = {checks.parse_config.__code__: "parse", checks._check.__code__: "check"}
    readers = {msgspec.convert: "convert", msgspec.json.decode: "json"}
    found: Counter[str] = Counter()

    def spy(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code in ours:
            found[ours[frame.f_code]] += 1
        elif event == "call" and frame.f_code in (yaml.load.__code__, yaml.safe_load.__code__):
            found["yaml"] += 1
        elif event == "c_call" and argument in readers and _is_ours(frame):
            found[readers[argument]] += 1

    sys.setprofile(spy)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize("checkpoint", ["best", "last"])
@pytest.mark.parametrize(
    ("command", "out"), [(predict, "x.csv"), (embed, "x.npz"), (score, None), (export, "x.pt")]
)
def test_the_saved_configuration_is_parsed_and_checked_once(
    run: Path, tmp_path: Path, command: Any, out: str | None, checkpoint: str
) -> None:
    options = [str(run), "--checkpoint", checkpoint]
    options += ["--out", str(tmp_path / out)] if out else []

    def call() -> None:
        assert CliRunner().invoke(command.main, options).exit_code == 0

    found = count_parsing(call)
    # Two conversions, of the configuration and of the checkpoint that takes it as it is; two JSON
    # texts, the header of the file and the description in it.
    expected = {"parse": 1, "check": 1, "convert": 2}
    assert found == Counter({**expected, "json": 2} if checkpoint == "best" else expected)


def test_a_second_parse_would_be_counted() -> None:
    values = checks.Config().to_dict()
    twice = count_parsing(lambda: [checks.parse_config(values) for _ in range(2)])
    assert twice == Counter(parse=2, check=2, convert=2)
