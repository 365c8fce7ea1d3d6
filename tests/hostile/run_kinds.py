"""Make kinds of hostile input, and read each in a process of its own; a JSON line for each.

python run_kinds.py FOLDER [KIND ...]
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from forge import options, write_dataset, write_recordings
from kinds import KINDS

import shardprep
from shardprep import ShardprepError
from shardprep.check.repair import repair_shards

SECONDS = 60
Report = dict[str, Any]


class Outcome:
    """How reading a kind went: errors that are allowed, and others."""

    def __init__(self) -> None:
        self.refusals: list[str] = []
        self.crashes: list[str] = []

    def attempt(self, work: Callable[..., object], *arguments: object, **named: object) -> Any:
        try:
            return work(*arguments, **named)
        except ShardprepError as error:
            # Running out of memory is no answer to a hostile file.
            out_of_memory = isinstance(error.__cause__, MemoryError) or "no more memory" in str(
                error
            )
            (self.crashes if out_of_memory else self.refusals).append(str(error))
        except Exception:
            self.crashes.append(traceback.format_exc())
        return None


def read_shards(folder: Path, outcome: Outcome) -> None:
    shard_set = outcome.attempt(shardprep.open_shards, folder)
    for name in shard_set or ("train", "test"):
        split = outcome.attempt(shard_set.__getitem__, name) if shard_set else None
        for index in range(len(split) if split is not None else 0):
            outcome.attempt(split.read, index)
            outcome.attempt(split.segments, [index], [0], 40)
        if split is not None:
            outcome.attempt(getattr, split, "keys")
            outcome.attempt(split.segments, np.arange(len(split)), split.frames - 1, 100)
        outcome.attempt(stream_all, folder, name)
    if shard_set is not None:
        outcome.attempt(getattr, shard_set, "test_entries")
    report = outcome.attempt(shardprep.verify_shards, folder, deep=True)
    if report is not None:
        outcome.refusals.extend(f"{folder}: {fault}" for fault in report.faults)
    repaired = outcome.attempt(repair_shards, folder, drop=True)
    if repaired is not None:
        outcome.attempt(shardprep.open_shards, folder)


def stream_all(folder: Path, split: str) -> None:
    for _ in shardprep.stream(folder, split):
        pass


def build_from(folder: Path, outcome: Outcome) -> None:
    for on_error in ("fail", "skip"):
        target = folder.parent / f"shards-{on_error}"
        report = outcome.attempt(shardprep.build_shards, folder, target, options(on_error=on_error))
        if report is not None:
            outcome.refusals.extend(f"{folder}: {reject}" for reject in report.rejects)
            assert shardprep.verify_shards(target, deep=True).intact
            shutil.rmtree(target)


def use_recordings(folder: Path, outcome: Outcome) -> None:
    build_from(folder, outcome)
    path = folder / "id0" / "a.wav"
    places: list[Path | bytes] = [path]
    if path.is_file() and not path.is_symlink():
        places.append(path.read_bytes())
    for place in places:
        try:
            shardprep.audio_features(place, shardprep.FeatureRecipe())
        except (ValueError, OSError) as fault:
            outcome.refusals.append(f"{path}: {fault}")


def build_into(folder: Path, outcome: Outcome) -> None:
    source = folder.parent / "Dataset"
    for overwrite in (False, True):
        outcome.attempt(shardprep.build_shards, source, folder, options(overwrite=overwrite))
    if (folder / "manifest.json").is_file():
        # The build has ignored what was wrong, and the set is intact.
        assert shardprep.verify_shards(folder, deep=True).intact
        outcome.refusals.append(f"{folder}: built again")


ENTRIES = {
    "plain": read_shards,
    "zstd": read_shards,
    "uint8": read_shards,
    "dataset": build_from,
    "audio": use_recordings,
    "target": build_into,
}


def states(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def make(place: Path, name: str, pipe: Connection) -> None:
    KINDS[name].make(place / KINDS[name].entry)
    pipe.send("made")


def read(place: Path, name: str, pipe: Connection) -> None:
    # Python's own handler would run only after a system call has ended.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS)
    os.chdir(place)
    before, outcome = peak(), Outcome()
    try:
        ENTRIES[KINDS[name].entry](place / KINDS[name].entry, outcome)
    except Exception:
        outcome.crashes.append(traceback.format_exc())
    pipe.send((outcome.refusals[:20], outcome.crashes, peak() - before))


def in_a_process(work: Callable[[Path, str, Connection], None], place: Path, name: str) -> Any:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=work, args=(place, name, theirs))
    process.start()
    theirs.close()
    answer = None
    with contextlib.suppress(EOFError):
        answer = ours.recv()
    process.join()
    return answer if answer is not None else process.exitcode


def run(base: Path, name: str) -> Report:
    place = base / name
    shutil.copytree(base / "valid", place)
    (place / "outside").mkdir()
    (place / "outside" / "secret").write_text("secret")
    assert in_a_process(make, place, name) == "made", name
    before = states(place / "outside")
    began = time.monotonic()
    answer = in_a_process(read, place, name)
    if isinstance(answer, int):
        answer = [], [f"ended with exit code {answer}"], 0
    report = {
        "kind": name,
        "refusals": answer[0],
        "crashes": answer[1],
        "growth": answer[2],
        "seconds": round(time.monotonic() - began, 3),
        "canary": bool([*base.rglob("canary"), *Path.cwd().glob("canary")]),
        "outside_changed": states(place / "outside") != before,
    }
    shutil.rmtree(place)
    return report


def main(base: Path, names: list[str]) -> None:
    valid = base / "valid"
    write_dataset(valid / "Dataset")
    shutil.copytree(valid / "Dataset", valid / "dataset")
    (valid / "target").mkdir()
    write_recordings(valid / "audio")
    for folder, own in (("plain", {}), ("zstd", {"codec": "zstd"}), ("uint8", {"dtype": "uint8"})):
        shardprep.build_shards(valid / "Dataset", valid / folder, options(**own))
        # Loads everything that is loaded on first use, so that it does not count below.
        outcome = Outcome()
        read_shards(valid / folder, outcome)
        assert not outcome.refusals + outcome.crashes, outcome.refusals + outcome.crashes
    use_recordings(valid / "audio", outcome)
    assert not outcome.refusals + outcome.crashes, outcome.refusals + outcome.crashes
    (valid / "audio" / "id0" / "a.wav").unlink()
    for name in names or KINDS:
        print(json.dumps(run(base, name)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
