"""The commands that meet errors: what each begins with, does, may change, and has to leave."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import shardprep
from scripts.torture.shards import contents
from shardprep.format.card import CARD_NAME
from shardprep.format.manifest import SOURCE_TIMES_NAME

PER_SHARD = 4
STEPS, SAVED_STEP = 4, 2
_PATIENCE = 5.0
SOURCE, SHARDS, FAULTY, RUNS, TRAINED = "Dataset", "shards", "faulty", "runs", "trained"
MORE = "More"
OUT, CACHE, SUBMISSION = "out", "cache", "submission.csv"
_TRAIN = {
    "name": "run",
    "data.batch_size": 4,
    "train.total_steps": STEPS,
    "train.valid_steps": 1,
    "train.log_steps": 1,
    "train.save_steps": 1,
    # So that one is deleted.
    "train.keep": STEPS - 1,
}
Files = dict[str, str]


@dataclass(frozen=True)
class Command:
    """A command, in a folder that has parts of the template.

    The same command, given again, must succeed after an error.
    """

    name: str
    parts: tuple[str, ...]
    """Folders of the template that it begins with."""
    words: tuple[str, ...]
    """Words of `shardprep`; {folder} and {url} are filled in. Empty: `read_set` of {place}."""
    results: tuple[str, ...] = ()
    """Files and folders that it leaves, which must be those of an undisturbed run."""
    may_change: tuple[str, ...] = ()
    """Beginnings of the paths of files that it may replace or remove."""
    may_grow: tuple[str, ...] = ()
    """Files that it may only add to."""
    model: str = ""
    """A model that must load, whatever has happened."""
    place: str = ""
    """For `read_set`: what to read; its stdout is a result."""

    @property
    def is_remote(self) -> bool:
        """Whether it reads the shards from a server."""
        return "{url}" in self.place

    def begin(self, template: Path, folder: Path) -> None:
        """Make the folder that the command begins with."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for part in self.parts:
            shutil.copytree(template / part, folder / part)

    def call(self, folder: Path, url: str, cache_bytes: int) -> tuple[str, list[Any]]:
        """The function of this module that does it, and its arguments."""
        places = {"folder": str(folder), "url": url}
        if self.place:
            return "read_set", [self.place.format(**places), str(folder / CACHE), cache_bytes]
        return "shardprep_command", [word.format(**places) for word in self.words]

    def result(self, folder: Path) -> Files:
        """What it has left: path in the folder to sha256; work folders and times are left out."""
        found: Files = {}
        for name in self.results:
            place = folder / name
            files = contents(place) if place.is_dir() else {}
            if place.is_file():
                files = {"": hashlib.sha256(_ordered(place)).hexdigest()}
            found |= {os.path.join(name, path).rstrip("/"): x for path, x in files.items()}
        kept = (path for path in found if "/.shardprep-" not in path)
        # No parts of a set; what a command cannot write of them, it says in a note.
        others = (SOURCE_TIMES_NAME, CARD_NAME)
        return {path: found[path] for path in kept if Path(path).name not in others}

    def lost(self, before: Mapping[str, str], folder: Path) -> list[str]:
        """Files that were healthy before, and are missing or others now, though they may not."""
        now = contents(folder)
        free = self.may_change + self.may_grow
        return [p for p, value in before.items() if now.get(p) != value and not p.startswith(free)]


def _ordered(path: Path) -> bytes:
    """The bytes of a file; those of a model with its header in order, which differs else."""
    data = path.read_bytes()
    if path.suffix != ".safetensors":
        return data
    end = 8 + int.from_bytes(data[:8], "little")
    return json.dumps(json.loads(data[8:end]), sort_keys=True).encode() + data[end:]


def _train_words() -> tuple[str, ...]:
    options = {**_TRAIN, "train.runs": "{folder}/" + RUNS, "data.shards": "{folder}/" + SHARDS}
    return ("train", "--config", "smoke", *(f"--{key}={value}" for key, value in options.items()))


_BUILD = ("--samples-per-shard", str(PER_SHARD))
_LAST = f"step-{STEPS:08d}.pt"

COMMANDS = (
    Command(
        "build",
        (SOURCE,),
        ("build", "{folder}/Dataset", "{folder}/out", *_BUILD, "--workers", "2"),
        results=(OUT,),
    ),
    Command(
        "build --append",
        (MORE, SHARDS),
        ("build", "{folder}/More", "{folder}/shards", "--append", "--workers", "2"),
        results=(SHARDS,),
        may_change=tuple(
            f"{SHARDS}/{name}" for name in ("manifest.json", "split=", SOURCE_TIMES_NAME, CARD_NAME)
        ),
    ),
    Command("open and read", (SHARDS,), (), place="{folder}/shards"),
    Command("cache", (), (), place="{url}"),
    Command(
        "train",
        (SHARDS, RUNS),
        (*_train_words(), "--resume"),
        results=(f"{RUNS}/run/checkpoints/{_LAST}", f"{RUNS}/run/model/model.safetensors"),
        may_change=tuple(
            f"{RUNS}/run/{name}" for name in ("model/", "config.yaml", "checkpoints/step-00000001")
        ),
        may_grow=(f"{RUNS}/run/metrics.jsonl",),
        model=f"{RUNS}/run/model/model.safetensors",
    ),
    Command(
        "verify",
        (SOURCE, SHARDS),
        ("verify", "{folder}/shards", "--deep", "--against", "{folder}/Dataset"),
    ),
    Command(
        "repair",
        (SOURCE, FAULTY),
        ("repair", "{folder}/faulty", "--source", "{folder}/Dataset"),
        results=(FAULTY,),
        may_change=(f"{FAULTY}/train-000000.tar",),
    ),
    Command(
        "repair --drop",
        (FAULTY,),
        ("repair", "{folder}/faulty", "--drop"),
        results=(FAULTY,),
        may_change=tuple(
            f"{FAULTY}/{name}"
            for name in ("train-000000.tar", "split=train.index.npy", "manifest.json", CARD_NAME)
        ),
    ),
    Command(
        "repair --drop, intact",
        (SHARDS,),
        ("repair", "{folder}/shards", "--drop"),
        results=(SHARDS,),
    ),
    Command(
        "predict",
        (SHARDS, TRAINED),
        ("predict", "{folder}/trained/run", "--shards", "{folder}/shards")
        + ("--out", "{folder}/submission.csv"),
        results=(SUBMISSION,),
    ),
)


def shardprep_command(*words: str) -> int:
    """A command of `shardprep`, as a terminal runs it."""
    from shardprep.cli import main

    sys.argv = ["shardprep", *words]
    main()


def read_set(place: str, cache: str, cache_bytes: int) -> int:
    """Read all of a set twice; print a digest of it. Behind a URL, by way of a cache.

    Returns:
        The exit code of a command that does this.
    """
    try:
        for _ in range(2):
            print(_digest(place, cache, cache_bytes))
    except shardprep.ShardprepError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _digest(place: str, cache: str, cache_bytes: int) -> str:
    keep = None
    if not os.path.isabs(place):
        keep = shardprep.ShardCache(cache, cache_bytes, patience=_PATIENCE)
    digest = hashlib.sha256()
    shards = shardprep.open_shards(place, keep)
    for split in shards.values():
        for index in range(len(split)):
            digest.update(split.read(index).tobytes())
    for batch in shardprep.UtteranceLoader(shards["train"], max_frames=1000):
        digest.update(batch["mel"].numpy().tobytes())
    digest.update(repr(shards.rejects).encode())
    return digest.hexdigest()


def loads(path: str) -> int:
    """Whether a model can be loaded, as an exit code."""
    from shardprep_trainer.checkpoint.files import load

    load(Path(path))
    return 0


def make_template(
    folder: Path, parts: Container[str], run: Callable[[Sequence[str]], None]
) -> None:
    """Make what commands begin with: a data set, shards, damaged shards, and runs.

    Args:
        folder: Gets the parts.
        parts: Names of the parts; the data set and the shards are always made.
        run: Runs a command of `shardprep`.
    """
    sizes = ["--speakers", "3", "--utterances", "8", "--test-utterances", "4"]
    sizes += ["--frames-min", "70", "--frames-max", "100", "--workers", "1"]
    made = [sys.executable, "-m", "scripts.synthetic"]
    subprocess.run([*made, str(folder), *sizes], check=True, capture_output=True)
    if MORE in parts:
        more = folder / "other"
        subprocess.run([*made, str(more), *sizes, "--seed", "1"], check=True, capture_output=True)
        (more / SOURCE).rename(folder / MORE)
    run(["build", str(folder / SOURCE), str(folder / SHARDS), *_BUILD, "--workers", "1"])
    if FAULTY in parts:
        shutil.copytree(folder / SHARDS, folder / FAULTY)
        _damage(folder / FAULTY)
    for runs, extra in ((RUNS, [f"--train.stop_step={SAVED_STEP}"]), (TRAINED, [])):
        if runs in parts:
            words = [word.format(folder=folder) for word in _train_words()]
            run([*words, f"--train.runs={folder / runs}", *extra])


def _damage(folder: Path) -> None:
    """Change a byte of an utterance in the first shard."""
    row = shardprep.open_shards(folder)["train"].locations[0]
    with (folder / "train-000000.tar").open("r+b") as file:
        file.seek(int(row["offset"]) + int(row["nbytes"]) // 2)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
