"""Try the lowest versions of all dependencies but PyTorch that pyproject.toml allows.

    python -m scripts.lowest

The program makes an environment in a temporary folder, installs this checkout there with the extras
train, export, http, s3, ray, parquet and audio, and runs on synthetic data: build (also on Ray, and
from recordings), verify, inspect, train, predict, score, embed and export. PyTorch has the version
in constraints.txt, because old versions are large and need an old NumPy. Exit codes: 0 all worked,
1 a command failed.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import click
from packaging.requirements import Requirement

CHECKOUT = Path(__file__).resolve().parents[2]
EXTRAS = ("torch", "train", "export", "http", "s3", "ray", "parquet", "audio")
NOT_LOWEST = "torch"

COMMANDS = """
python -m scripts.synthetic WORK/data --speakers 3 --utterances 8 --test-utterances 4
shardprep build WORK/data/Dataset WORK/shards --codec zstd --workers 2
shardprep build WORK/data/Dataset WORK/ray --engine ray --workers 2
shardprep verify WORK/shards --deep --against WORK/data/Dataset
shardprep inspect WORK/shards --parquet WORK/shards.parquet
shardprep train --config smoke --data.shards WORK/shards --train.runs WORK/runs
shardprep predict WORK/runs/smoke --out WORK/submission.csv --labels WORK/data/test_labels.csv
shardprep score WORK/runs/smoke
shardprep embed WORK/runs/smoke --out WORK/embeddings.npz
shardprep export WORK/runs/smoke --out WORK/model.onnx
python -m scripts.synthetic WORK/voices --recordings --speakers 3 --utterances 4 --test-utterances 0
shardprep build WORK/voices/recordings WORK/audio --workers 2
shardprep embed WORK/runs/smoke WORK/voices/recordings --features-from homework --out WORK/a.npz
"""


def lowest_versions(project: dict[str, object], constraints: str) -> list[str]:
    """The lowest versions that a project allows, as constraints of pip.

    Args:
        project: The table `project` of pyproject.toml.
        constraints: Text of constraints.txt, which names the version of PyTorch.

    Returns:
        Lines such as numpy==1.26, one for each dependency, those of EXTRAS included.
    """
    extras = project["optional-dependencies"]
    assert isinstance(extras, dict)
    lists = [project["dependencies"], *(extras[name] for name in EXTRAS)]
    pins = [line for line in constraints.splitlines() if line.startswith(f"{NOT_LOWEST}==")]
    for requirement in (Requirement(line) for lines in lists for line in lines):
        if requirement.name not in (project["name"], NOT_LOWEST):
            (lowest,) = (one.version for one in requirement.specifier if one.operator == ">=")
            pins.append(f"{requirement.name}=={lowest}")
    return pins


def run(*command: str | Path) -> None:
    """Run a command in the checkout, and exit with 1 if it fails."""
    print("+", shlex.join(map(str, command)), file=sys.stderr, flush=True)
    if code := subprocess.run(command, cwd=CHECKOUT).returncode:
        print(f"exit code {code}", file=sys.stderr)
        sys.exit(1)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Try the lowest versions of all dependencies but PyTorch that pyproject.toml allows.

    Exit codes: 0 all commands worked, 1 a command failed.
    """
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    pins = lowest_versions(project, (CHECKOUT / "constraints.txt").read_text())
    print(*pins, sep="\n")
    with tempfile.TemporaryDirectory() as work:
        constraints, programs = Path(work) / "lowest.txt", Path(work) / "venv" / "bin"
        constraints.write_text("\n".join(pins))
        run(sys.executable, "-m", "venv", Path(work) / "venv")
        extras = ",".join(EXTRAS)
        install = ("-m", "pip", "install", "--quiet", "-c", constraints)
        run(programs / "python", *install, "-e", f"{CHECKOUT}[{extras}]")
        for line in COMMANDS.strip().splitlines():
            program, *words = line.replace("WORK", work).split()
            run(programs / program, *words)
    print("all commands worked with these versions")


if __name__ == "__main__":
    main()
