"""scripts/slurm_train.sh, with stubs in the place of SLURM's commands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PATIENCE, wait_until

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "scripts" / "slurm_train.sh"

# A node has a process in the place of each torchrun, and passes SIGTERM on to it, as srun does.
SRUN = """#!/bin/bash
echo "srun $*" >> "$LOG"
while [ "${1#--}" != "$1" ]; do shift; done
pids=
trap 'kill -TERM $pids' TERM
for node in 1 2; do "$@" & pids="$pids $!"; done
for pid in $pids; do
  while wait "$pid"; code=$?; kill -0 "$pid" 2>/dev/null; do :; done
  [ "$code" -eq 0 ] || failed=$code
done
exit "${failed:-0}"
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$LOG"
[ "$1" = show ] && printf 'node7\\nnode8\\n'
exit 0
"""
# Stands for a training that saves on SIGTERM; all else is the interpreter's.
PYTHON = """#!/bin/bash
if [ "$2" != torch.distributed.run ]; then exec "$REAL" "$@"; fi
mkdir -p "$SHARDPREP_CACHE"
trap 'echo saved >> "$LOG"; exit 1' TERM
echo "torchrun cache=$SHARDPREP_CACHE share=$TORCH_DISABLE_SHARE_RDZV_TCP_STORE" >> "$LOG"
for _ in $(seq "${TENTHS:-0}"); do sleep 0.1; done
exit "${CODE:-0}"
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to submit from, with the stubs on the PATH; the file of what they were told."""
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "python": PYTHON}.items():
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    (tmp_path / "trainer").symlink_to(ROOT / "trainer")
    log = tmp_path / "log"
    values = {
        "PATH": f"{stubs}{os.pathsep}{os.environ['PATH']}",
        "REAL": sys.executable,
        "LOG": str(log),
        "TMPDIR": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "SLURM_JOB_ID": "4321",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_GPUS_PER_NODE": "a100:4",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SHARDPREP_CACHE", raising=False)
    monkeypatch.chdir(tmp_path)
    return log


def submit(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["bash", str(SCRIPT), *arguments])


def test_the_script_is_bash() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_every_node_gets_one_launcher_for_its_gpus_and_the_arguments_as_they_are(
    job: Path, tmp_path: Path
) -> None:
    assert submit("--name", "a b", "--data.shards", "s3://x/y").wait(PATIENCE) == 0
    told = job.read_text().splitlines()
    assert told[0] == "scontrol show hostnames node[7-8]"
    words = told[1].split()
    assert words[:3] == ["srun", "--ntasks=2", "--ntasks-per-node=1"]
    for option in (
        "--nnodes 2 --nproc-per-node 4",
        "--rdzv-id 4321-0",
        "--rdzv-backend c10d --rdzv-endpoint node7:24321",
        f"{tmp_path}/trainer/train.py --name a b --data.shards s3://x/y",
    ):
        assert option in told[1]
    assert "--resume" not in told[1]
    # Of the node, and gone with the job.
    assert told[2:4] == 2 * [f"torchrun cache={tmp_path}/shardprep-4321 share=1"]
    assert not (tmp_path / "shardprep-4321").exists()
    assert not any("requeue" in line for line in told)


def test_a_cache_that_is_named_is_kept_and_a_failure_is_the_job_s(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARDPREP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CODE", "3")
    assert submit().wait(PATIENCE) == 3
    assert (tmp_path / "cache").is_dir()
    assert "requeue" not in job.read_text()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_warning_of_slurm_s_saves_and_queues_the_job_again(
    number: signal.Signals, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENTHS", "6000")
    process = submit()
    wait_until(lambda: job.exists() and job.read_text().count("torchrun cache") == 2, process)
    process.send_signal(number)
    assert process.wait(PATIENCE) == 0
    told = job.read_text().splitlines()
    assert told.count("saved") == 2
    assert told[-1] == "scontrol requeue 4321"


@pytest.mark.parametrize(
    ("restarts", "saved", "resumes"), [("0", True, False), ("1", False, False), ("2", True, True)]
)
def test_a_job_that_was_queued_again_resumes_if_there_is_a_checkpoint(
    restarts: str, saved: bool, resumes: bool, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    if saved:
        folder = job.parent / "my runs" / "big" / "checkpoints"
        folder.mkdir(parents=True)
        (folder / "step-00000007.pt").touch()
    assert submit("--name", "big", "--train.runs", "my runs").wait(PATIENCE) == 0
    launch = job.read_text().splitlines()[1]
    assert launch.endswith("my runs --resume" if resumes else "my runs")
    assert f"--rdzv-id 4321-{restarts}" in launch
