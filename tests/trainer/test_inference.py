"""From a run folder to a prediction: what is loaded on the way."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

_PREDICT = """
import json, sys
from shardprep_trainer.{name} import main
main({arguments!r}, standalone_mode=False)
print(json.dumps([name for name in sys.modules if name.startswith("shardprep_trainer")]))
"""


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
