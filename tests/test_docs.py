"""What the documents say is so: their examples parse, and the README's commands run."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from accelerate.commands.launch import launch_command_parser
from shardprep_trainer.config.command_line import parse_args
from shardprep_trainer.config.fields import Config, flatten
from torch.distributed.run import get_args_parser

from shardprep.format.index import index_dtype
from shardprep.format.manifest import Reject, decode_manifest

ROOT = Path(__file__).parents[1]
servers = importlib.import_module("scripts.servers.object_store")
README = (ROOT / "README.md").read_text()
FORMAT = (ROOT / "FORMAT.md").read_text()
MULTINODE = (ROOT / "docs" / "multinode.md").read_text()

# What makes the README's training commands end in seconds; a later option wins.
SHORTENED = (
    "--train.total_steps 2 --train.valid_steps 2 --data.batch_size 8 "
    "--model.dim 32 --model.ff_dim 64 --model.heads 2 --model.head_dim 16"
)


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_format_shows_a_manifest_that_readers_accept() -> None:
    manifest, reject = code_blocks(FORMAT, "json")
    assert decode_manifest(manifest.encode(), Path("FORMAT.md")).splits["test"].samples == 2
    assert msgspec.json.decode(reject, type=Reject, strict=True).reason


def test_format_shows_the_index_row_as_it_is() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `([<|]?\w+)` \| (\S+) \|", FORMAT, re.MULTILINE)
    dtype = index_dtype(37)
    expected = [(name, dtype[name].str.lstrip("|")) for name in dtype.names or ()]
    assert [(name, kind) for name, kind, _ in rows] == expected
    shown = {name: value for name, _, value in rows}
    assert int(shown["nbytes"]) == 128 + int(shown["frames"]) * 40 * 2


def test_readme_commands_run(tmp_path: Path, make_dataset: Callable[..., Path]) -> None:
    make_dataset(speakers=3, utterances=14)
    (tmp_path / "trainer").symlink_to(ROOT / "trainer")
    commands = [line for block in code_blocks(README, "sh") for line in block.splitlines()]
    commands = [line.split("#")[0].strip() for line in commands if not line.startswith("make ")]
    assert sum("trainer/train.py" in command for command in commands) >= 4
    seen = set()
    for command in commands:
        if command in seen:
            continue
        seen.add(command)
        run_command(command, tmp_path)
    rows = (tmp_path / "submission.csv").read_text().splitlines()
    assert rows[0] == "Id,Category"
    assert len(rows) == 1 + 5
    for code in code_blocks(README, "python"):
        run([sys.executable, "-W", "error", "-c", code], tmp_path)


@pytest.mark.remote
def test_readme_commands_on_urls_run(
    tmp_path: Path, make_dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(speakers=3, utterances=14)
    (tmp_path / "trainer").symlink_to(ROOT / "trainer")
    (block,) = code_blocks(README, "bash")
    commands = [line.split("#")[0].strip() for line in block.splitlines()]
    given = {name for line in commands for name in re.findall(r"(?:export|^| )(\w+)=", line)}
    with servers.object_store(tmp_path / "store") as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("SHARDPREP_CACHE", str(tmp_path / "cache"))
        assert {"AWS_ENDPOINT_URL", "SHARDPREP_CACHE", "SHARDPREP_CACHE_GB"} <= given
        assert given - {"SHARDPREP_CACHE_GB"} <= os.environ.keys()
        done = 0
        for command in commands:
            if not command.startswith("export"):
                own = command.replace("s3://bucket/shards", store.url("shards"))
                run_command(
                    own.replace("https://example.org/shards", store.http_url("shards")), tmp_path
                )
                done += own != command
    assert done == 4
    assert (tmp_path / "submission.csv").exists()


def run_command(command: str, folder: Path) -> None:
    if "trainer/train.py" in command:
        command += f" {SHORTENED}"
    run(["sh", "-c", command], folder)


def run(command: list[str], folder: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def test_readme_names_only_targets_that_make_knows() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", README))
    assert {"demo", "test"} <= named <= targets


def launches() -> list[list[str]]:
    """The launches of docs/multinode.md, as words."""
    lines = [line for block in code_blocks(MULTINODE, "sh") for line in block.splitlines()]
    return [shlex.split(line) for line in lines if not line.startswith("export ")]


@pytest.mark.parametrize("words", launches(), ids=lambda words: " ".join(words[:6]))
def test_multinode_launches_are_what_the_launchers_and_the_trainer_take(words: list[str]) -> None:
    script = next(word for word in words if word.endswith((".py", ".sh")))
    assert (ROOT / script).is_file()
    at = words.index(script)
    flags, options = words[1:at], words[at + 1 :]
    if words[0] == "torchrun":
        parsed = get_args_parser().parse_args([*flags, script])
        assert parsed.rdzv_backend == "c10d"
    elif words[0] == "accelerate":
        parsed = launch_command_parser().parse_args([*words[2:at], script])
        assert parsed.num_machines == 2
    else:
        assert [words[0], *flags[::2]] == ["sbatch", "--nodes", "--gpus-per-node"]
    config = parse_args([re.sub("^trainer/", f"{ROOT}/trainer/", word) for word in options]).config
    assert config.data.global_batch


def test_multinode_names_only_fields_and_variables_that_there_are() -> None:
    fields = set(flatten(Config().to_dict()))
    named = set(re.findall(r"\b(?:data|train)\.\w+", MULTINODE)) - {"train.py"}
    assert {"data.global_batch", "data.lanes", "train.hang_seconds"} <= named <= fields
    sources = [*(ROOT / "trainer").glob("*.py"), *(ROOT / "shardprep").glob("*.py")]
    ours = "".join(path.read_text() for path in sources)
    for name in re.findall(r"\bSHARDPREP_\w+|\bTORCH_DISABLE\w+", MULTINODE):
        assert name in ours
    for code in re.findall(r"python -c \"(.*?)\"`", MULTINODE):
        compile(code, "docs/multinode.md", "exec")


@pytest.mark.slow
@pytest.mark.remote
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_multinode_launches_run(
    launcher: str, tmp_path: Path, make_dataset: Callable[..., Path]
) -> None:
    """On two machines that are one, without GPUs and with a process less."""
    source = make_dataset(speakers=3, utterances=14)
    (tmp_path / "trainer").symlink_to(ROOT / "trainer")
    run(["shardprep", "build", str(source), "shards/"], tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    found = [words for words in launches() if words[0] == launcher and "1:2" not in words]
    machines = found * 2 if launcher == "torchrun" else found
    assert len(machines) == 2
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    started = []
    for words in machines:
        line = shlex.join([*words, *SHORTENED.split(), "--data.global_batch", "8"])
        for before, now in {
            "10.0.0.1": "127.0.0.1",
            "29500": port,
            "29501": port,
            "--nproc-per-node 4": "--nproc-per-node 2",
            "--num_processes 8": "--cpu --num_processes 4",
        }.items():
            line = line.replace(before, now)
        started.append(subprocess.Popen(shlex.split(line), cwd=tmp_path, env=environment))
    assert [process.wait(120) for process in started] == [0, 0]
    name = machines[0][machines[0].index("--name") + 1]
    assert (tmp_path / "runs" / name / "checkpoints" / "step-00000002.pt").is_file()


def test_no_table_is_missing() -> None:
    assert "@@" not in README
