"""Every command and every Python snippet of the pages is tried, in one of three ways.

- Every command is compared with the real command line, without running it. Nothing more is possible
  where a page talks of a cluster.
- The commands of `shardprep` and the snippets run in this process, on one small set and one short
  run that all pages share.
- The slow tests run the pages as a user types them, in shells.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import msgspec
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState, GradientState
from torch.distributed.run import get_args_parser

from shardprep import FeatureRecipe
from shardprep.cli import cli
from shardprep_trainer.checkpoint.files import load
from shardprep_trainer.checkpoint.model_folder import WEIGHTS, write_model
from shardprep_trainer.config.command_line import parse_args
from shardprep_trainer.train import main as train
from tests.shardprep.audio.oracle import speech, wav

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
}
servers = importlib.import_module("scripts.servers.object_store")

TRAINER = ("trainer/train.py", "shardprep_trainer.train", "scripts/slurm_train.sh")
# What makes training end in seconds; a later option wins.
SHORTENED = (
    "--train.total_steps 2 --train.valid_steps 2 --data.batch_size 8 --model.dim 32 "
    "--model.ff_dim 64 --model.heads 2 --model.head_dim 16"
)
# What makes others end soon.
BRIEF = {
    "build": "--workers 1",
    "features": "--workers 1",
    "adopt": "--workers 1",
    "bench": "--rounds 1 --seconds 0.05 --batch-size 8",
}
# Without export, which takes long: a slow test runs it.
RUN_HERE = ["build", "features", "adopt", "inspect", "verify", "repair", "bench"]
RUN_HERE += ["predict", "score", "embed", "compare", "identify"]

Cli = Callable[..., subprocess.CompletedProcess[str]]


def code_blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[str]:
    """The commands of a page's blocks of shell code, without comments."""
    return in_block("".join(code_blocks(page, "sh")))


def in_block(text: str) -> list[str]:
    """The commands of a block of shell code, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


def split_launch(words: list[str]) -> tuple[list[str], list[str]]:
    """The words of a launcher up to the trainer's name, and the options of the trainer."""
    behind = 1 + next(n for n, word in enumerate(words) if word in TRAINER)
    return words[:behind], words[behind:]


def check(command: str) -> None:
    """Compare a command with the real command line, without running it.

    Raises:
        AssertionError: No test knows how to check such a command.
    """
    words = shlex.split(command)
    if set(words) & set(TRAINER):
        words, options = split_launch(words)
        parse_args(options)
    match words:
        case ["accelerate", "launch", *flags]:
            assert launch_command_parser().parse_args(flags).training_script in TRAINER
        case ["torchrun", *flags]:
            parsed = get_args_parser().parse_args(flags)
            assert parsed.training_script in TRAINER
            assert parsed.rdzv_backend in ("static", "c10d")
        case ["sbatch", *flags, script]:
            assert flags[::2] == ["--nodes", "--gpus-per-node"]
            assert (ROOT / script).is_file()
        case ["shardprep", "train", *options]:
            parse_args(options)
        case ["shardprep", name, *arguments]:
            parent = click.Context(cli, **cli.context_settings)
            parsed = cli.get_command(parent, name)
            assert parsed is not None, f"there is no command {name}"
            # A command keeps the names of its help option, which are those of the first parent.
            parsed.make_context(name, arguments, parent=parent)
        case ["python", "-m", module, *arguments]:
            package = (ROOT / module.replace(".", "/")).is_dir()
            script = importlib.import_module(f"{module}.__main__" if package else module)
            script.main.make_context(module, arguments)
        case ["ray", "start", *arguments]:
            importlib.import_module("ray.scripts.scripts").start.make_context("start", arguments)
        case ["pip", "install", *_, requirement]:
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            found = re.fullmatch(r"(shardprep|\.)(?:\[([\w,]+)\])?", requirement)
            assert found
            assert set((found[2] or "dev").split(",")) <= project["optional-dependencies"].keys()
        case ["make", *arguments]:
            targets = [argument for argument in arguments if "=" not in argument]
            assert set(targets) <= make_targets()
        case ["pytest", *arguments]:
            places = [word.split("::")[0] for word in arguments if word.startswith("tests/")]
            assert places
            assert all((ROOT / place).exists() for place in places)
        case ["export", *assignments]:
            code = "".join(path.read_text() for path in (ROOT / "shardprep").rglob("*.py"))
            for name in (assignment.split("=")[0] for assignment in assignments):
                assert name.startswith(("AWS_", "TORCH_", "PYTHONPATH")) or name in code, name
        case ["energon", "prepare", *_]:
            # tests/readers/ runs it.
            pass
        case ["ln", "-s", _, _] | ["ruff", "check" | "format", "."] | ["mypy"]:
            pass
        case _:
            raise AssertionError("no test knows how to check such a command")


def blocks(page: str) -> list[tuple[str, str]]:
    """The blocks of shell and Python code of a page, in their order, with their language."""
    return re.findall(r"^```(sh|python)\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)


def can_import(snippet: str) -> bool:
    """Whether a snippet needs no package that takes long, or that is not installed."""
    kaldi = "kaldiio" not in snippet or importlib.util.find_spec("kaldiio") is not None
    return kaldi and "onnxruntime" not in snippet


def runs_here(command: str) -> bool:
    """Whether a command runs without a server, a cluster and other processes."""
    program, name, *_ = [*command.split(), ""]
    if "data/train/" in command and not can_import("import kaldiio"):
        return False
    elsewhere = re.search(r"s3://|https://|--engine ray", command)
    return program == "shardprep" and name in RUN_HERE and not elsewhere


def make_targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES)
def test_the_command_lines_take_the_commands_of_a_page(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whether a folder is there is another question.
    monkeypatch.setattr(click.Path, "convert", lambda self, value, param, ctx: Path(value))
    monkeypatch.chdir(tmp_path)
    Path("runs/voices").mkdir(parents=True)
    Path("runs/voices/config.yaml").write_text("name: voices\n")
    for command in commands(page):
        try:
            check(command)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{page}: {command}") from error


@pytest.mark.parametrize("page", PAGES)
def test_blocks_of_commands_say_that_they_are_shell_code(page: str) -> None:
    programs = r"^\s*(shardprep|accelerate|torchrun|python|make|pip|ray|sbatch) [\w-]"
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)
    for language, block in blocks:
        assert language in ("sh", "python", "json", "yaml", "")
        assert language in ("sh", "python") or not re.search(programs, block, re.MULTILINE)
    indented = re.findall(r"(?<=\n\n)(?: {4}\S.*\n)+", PAGES[page])
    assert not [block for block in indented if re.search(programs, block, re.MULTILINE)]


@pytest.mark.parametrize("page", PAGES)
def test_commands_within_sentences_are_those_that_there_are(page: str) -> None:
    prose = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`([^`]+)`", prose):
        match code.split():
            case ["shardprep", name, *_] if name.isalpha():
                command = cli.get_command(click.Context(cli), name)
                assert command is not None, code
            case ["make", target, *_]:
                assert target in make_targets(), code
            case ["python", "-m", module, *_]:
                assert importlib.util.find_spec(module), code
            case ["pip", "install", *_]:
                check(code)


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Training runs in this process, on one thread of the CPU, and leaves nothing behind."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def write_recordings(folder: Path) -> None:
    """The recordings of the README: two files, and a folder of two speakers."""
    names = [f"Recordings/{speaker}/{n}.wav" for speaker in ("ann", "bea") for n in range(8)]
    for number, name in enumerate(("a.wav", "b.wav", *names)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(wav(speech(0.3, number)))


def write_own_encoder(folder: Path) -> None:
    """The module `mine` that a page shows."""
    (module,) = (text for text in code_blocks("docs/training.md", "python") if "Mine" in text)
    (folder / "mine.py").write_text(module)


@pytest.mark.usefixtures("one_process")
def test_the_commands_and_snippets_of_all_pages_run(
    make_dataset: Callable[..., Path],
    run_cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for source, target, seed in (("More", "more", 1), ("Dataset", "shards", 0)):
        make_dataset(source, speakers=3 + seed, utterances=14, seed=seed)
        assert run_cli("build", source, target, "--workers", "1").returncode == 0
    Path("mels/train").mkdir(parents=True)
    for number, split in enumerate(("train", "val")):
        shutil.copy(f"shards/{split}-000000.tar", f"mels/train/{number:05d}.tar")
    assert train([*SHORTENED.split(), "--train.trackers", "[]"]) == 0
    Path("runs/demo").symlink_to("boss")
    # Of one model twice nothing can be combined.
    shutil.copytree("runs/boss", "runs/best")
    # The same model, as if it had been trained on recordings.
    boss, features = load(Path("runs/boss/model", WEIGHTS)), FeatureRecipe().to_features()
    write_model(Path("runs/voices/model"), msgspec.structs.replace(boss, features=features))
    Path("runs/own").symlink_to("voices")
    write_own_encoder(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    own = ["--model.encoder", "mine:Mine", "--name", "mine", "--train.trackers", "[]"]
    assert train([*SHORTENED.split(), *own]) == 0
    write_recordings(tmp_path)
    done: set[str] = set()
    for page in PAGES:
        for language, text in blocks(page):
            for command in filter(runs_here, in_block(text)) if language == "sh" else ():
                if command not in done:
                    words = shlex.split(command)
                    ran = run_cli(*words[1:], *BRIEF.get(words[1], "").split())
                    assert ran.returncode == 0, f"{page}: {command}\n{ran.stderr}"
                    done.add(command)
            # tests/loops/ and tests/readers/ run those with other people's programs.
            elsewhere = page in ("docs/loops.md", "docs/readers.md")
            if language == "python" and not elsewhere and can_import(text):
                exec(compile(text, page, "exec"), {"__name__": "__main__"})
    assert {command.split()[1] for command in done} == set(RUN_HERE)
    assert len(Path("submission.csv").read_text().splitlines()) == 1 + 5


@pytest.mark.remote
@pytest.mark.usefixtures("one_process")
def test_the_commands_on_urls_run(
    make_dataset: Callable[..., Path],
    run_cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    make_dataset(speakers=3, utterances=14)
    monkeypatch.setenv("SHARDPREP_CACHE", str(tmp_path / "cache"))
    done = []
    with servers.object_store(tmp_path / "store") as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        for command in commands("docs/remote.md"):
            words = shlex.split(
                command.replace("s3://bucket/shards", store.url("shards")).replace(
                    "https://example.org/shards", store.http_url("shards")
                )
            )
            if set(words) & set(TRAINER):
                _, options = split_launch(words)
                assert train([*options, *SHORTENED.split(), "--train.trackers", "[]"]) == 0
            elif words[0] == "shardprep" and "ray" not in words:
                ran = run_cli(*words[1:], *BRIEF.get(words[1], "").split())
                assert ran.returncode == 0, f"{command}\n{ran.stderr}"
            else:
                continue
            done.append(words[1])
    assert done == ["build", "inspect", "verify", "launch", "predict"]


def run(command: str, folder: Path, **environment: str) -> None:
    """Run a command in a shell, with the programs and packages of this environment."""
    words = shlex.split(command)
    trains = set(words) & set(TRAINER) or words[:2] == ["shardprep", "train"]
    if trains and "--print-config" not in command:
        command += f" {SHORTENED}"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    everything = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        ["sh", "-c", command], cwd=folder, env=everything, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


# With what a page needs before its first command.
WHOLE_PAGES = {
    "README.md": [
        "shardprep build Recordings/ shards-audio/",
        "shardprep train --config demo --data.shards shards-audio/ --name voices",
    ],
    "docs/quickstart.md": [],
    "docs/training.md": ["shardprep build Dataset/ shards/", "shardprep build More/ more/"],
    "docs/evaluation.md": [
        "shardprep build Dataset/ shards/",
        "accelerate launch --cpu trainer/train.py",
        "cp -r runs/boss runs/best",
    ],
    "docs/recipe.md": [],
    "docs/scaling.md": [],
}
# Minutes of measuring have a test of their own.
LEFT_OUT = ("pip install", "python -m scripts.simulate --measure")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", WHOLE_PAGES)
def test_pages_run_as_they_are_typed(
    page: str, tmp_path: Path, make_dataset: Callable[..., Path]
) -> None:
    for name in ("trainer", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    if page != "docs/quickstart.md":
        make_dataset("More", speakers=4, utterances=14, seed=1)
        make_dataset(speakers=3, utterances=14)
    write_recordings(tmp_path)
    write_own_encoder(tmp_path)
    # An export ends with its shell.
    modules = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    for command in (*WHOLE_PAGES[page], *commands(page)):
        if not command.startswith(LEFT_OUT):
            # Hours of training are only planned.
            planned = " --dry-run" if "scripts.ladder " in command else ""
            run(command + planned, tmp_path, ACCELERATE_USE_CPU="true", PYTHONPATH=modules)
    for snippet in code_blocks(page, "python"):
        run(shlex.join([sys.executable, "-W", "error", "-c", snippet]), tmp_path)


@pytest.mark.slow
@pytest.mark.remote
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_multinode_launches_run(
    launcher: str, tmp_path: Path, make_dataset: Callable[..., Path]
) -> None:
    """On two machines that are one, without GPUs and with a process less."""
    make_dataset(speakers=3, utterances=14)
    (tmp_path / "trainer").symlink_to(ROOT / "trainer")
    run("shardprep build Dataset/ shards/", tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    lines = commands("docs/multinode.md")
    found = [line for line in lines if line.startswith(launcher) and "--nnodes 1:2" not in line]
    machines = found * 2 if launcher == "torchrun" else found
    assert len(machines) == 2
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    started = []
    for line in machines:
        line = f"{line} {SHORTENED} --data.global_batch 8"
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
    words = shlex.split(machines[0])
    name = words[words.index("--name") + 1]
    assert (tmp_path / "runs" / name / "checkpoints" / "step-00000002.pt").is_file()
