"""Damage shard sets and disturb builds in many ways, and count what is noticed and what is lost.

    python -m scripts.torture.shards [--dataset Dataset/] [--only PART]... [--out FILE.json]

Without --dataset, `scripts.synthetic` makes a small one. The parts:

- flips: random single bits of all files of a set are changed, one at a time. `verify` (sha256) and
  `verify --deep` must find each.
- truncations: every file of a set is truncated, at every member boundary and at random places.
  `verify` must find each, and opening must refuse the set, so that no reader silently returns less.
- kills: a build with two workers is killed (SIGKILL to it or to its process group) at a random
  moment; half of the builds are continued and killed a second time. Then the build is continued to
  its end. The set must be that of an undisturbed build.
- appends: the same with `build --append`, which extends a set by the other half of a data set. The
  old shards, and a set that is there after a kill, must be whole all the time.
- refusals: one write, fsync, rename, mkdir or unlink of a build fails, with ENOSPC and with EIO,
  each call in its own build. The build must end with a StorageError; when it is continued, the set
  must be identical.
- drops: random bytes of random shards are overwritten. `repair --source` must give the identical
  set, `repair --drop` an intact set with all other utterances.

Exit codes: 0 all was noticed and nothing lost, 1 otherwise, 2 usage.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import click
import msgspec
from tqdm import tqdm

from scripts.torture.injuries import group, refusing
from shardprep import (
    BuildError,
    BuildOptions,
    ShardprepError,
    StorageError,
    build_shards,
    open_shards,
    repair_shards,
    verify_shards,
)
from shardprep.bench.machine import machine
from shardprep.format.card import CARD_NAME
from shardprep.format.manifest import MANIFEST_NAME, SOURCE_TIMES_NAME, WORK_FOLDER, DType
from shardprep.storage.local import sha256_of

SAMPLES_PER_SHARD = 40
Result = dict[str, Any]


def contents(folder: Path) -> dict[str, str]:
    """Every file in a folder and its subfolders, with its sha256, but not source-times.npy."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != SOURCE_TIMES_NAME)
    return {str(path.relative_to(folder)): sha256_of(path) for path in files}


def files_of(folder: Path) -> list[Path]:
    """The files of a set."""
    return sorted(
        path for path in folder.iterdir() if path.name not in (SOURCE_TIMES_NAME, CARD_NAME)
    )


class Case:
    """A data set, an intact shard set of it, and how much to do."""

    def __init__(
        self,
        source: Path,
        work: Path,
        rng: random.Random,
        counts: dict[str, int],
        dtype: DType = "float16",
    ):
        self.source = source
        self.work = work
        self.rng = rng
        self.counts = counts
        self.intact = work / "intact"
        self.dtype = dtype
        options = BuildOptions(dtype=dtype, samples_per_shard=SAMPLES_PER_SHARD)
        build_shards(source, self.intact, options)

    def copy(self, name: str) -> Path:
        """A new copy of the intact set."""
        folder = self.work / name
        shutil.rmtree(folder, ignore_errors=True)
        return Path(shutil.copytree(self.intact, folder))


def flips(case: Case) -> Result:
    """Flip random single bits, one at a time."""
    folder, rounds = case.copy("flips"), case.counts["flips"]
    files = files_of(folder)
    sizes = [path.stat().st_size for path in files]
    found = {"verify": 0, "verify --deep": 0}
    missed = []
    for _ in bar(range(rounds), "flips"):
        (path,) = case.rng.choices(files, sizes)
        bit = case.rng.randrange(8 * path.stat().st_size)
        flip(path, bit)
        for name, deep in (("verify", False), ("verify --deep", True)):
            if path.name in {fault.file for fault in verify_shards(folder, deep=deep).faults}:
                found[name] += 1
            else:
                missed.append([name, path.name, bit])
        flip(path, bit)
    assert verify_shards(folder, deep=True).intact
    return {"asked": rounds, "found": found, "missed": missed, "bytes": sum(sizes)}


def flip(path: Path, bit: int) -> None:
    """Change one bit of a file in place."""
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def truncations(case: Case) -> Result:
    """Truncate each file at its boundaries and at random places."""
    folder = case.copy("truncations")
    cuts = [
        (path, at)
        for path in sorted(folder.glob("*.tar"))
        for at in range(0, path.stat().st_size, 512)
        if at % 10_240 == 0 or is_boundary(path, at)
    ]
    files = files_of(folder)
    for _ in range(case.counts["truncations"]):
        path = case.rng.choice(files)
        cuts.append((path, case.rng.randrange(path.stat().st_size)))
    found = refused = 0
    missed = []
    for path, at in bar(cuts, "truncations"):
        data = path.read_bytes()
        os.truncate(path, at)
        seen = path.name in {fault.file for fault in verify_shards(folder).faults}
        shut = not opens(folder)
        found, refused = found + seen, refused + shut
        if not (seen and shut):
            missed.append([path.name, at])
        path.write_bytes(data)
    return {
        "asked": len(cuts),
        "at_boundaries": len(cuts) - case.counts["truncations"],
        "found": found,
        "refused_on_opening": refused,
        "missed": missed,
    }


def is_boundary(path: Path, at: int) -> bool:
    """Whether a header of a member begins here."""
    with open(path, "rb") as file:
        file.seek(at + 257)
        return file.read(5) == b"ustar"


def opens(folder: Path) -> bool:
    """Whether all splits of a set can be opened, and all utterances read."""
    try:
        for split in open_shards(folder).values():
            for index in range(len(split)):
                split.read(index)
    except ShardprepError:
        return False
    return True


# Slow on purpose, so that most kills come while workers pack.
SLOW = ("--samples-per-shard=10", "--codec=zstd", "--level=22")


def kills(case: Case) -> Result:
    """Kill builds at random moments, and continue them."""
    folder = case.work / "kills"
    command = [sys.executable, "-m", "shardprep", "build", str(case.source), str(folder)]
    command += [*SLOW, "--workers=2", f"--dtype={case.dtype}"]
    return kill_often(case, command, folder, None)


def appends(case: Case) -> Result:
    """Kill appends at random moments, and continue them: each extends a set by the other half."""
    folder, half, begin = case.work / "appends", case.work / "half", case.work / "half-shards"
    write_half(case.source, half)
    build = [sys.executable, "-m", "shardprep", "build"]
    first = [*build, str(half), str(begin), *SLOW, f"--dtype={case.dtype}"]
    subprocess.run(first, check=True, capture_output=True)
    command = [*build, str(case.source), str(folder), "--append", "--workers=2"]
    return kill_often(case, command, folder, begin)


def write_half(source: Path, half: Path) -> None:
    """A data set of every other utterance of another one."""
    shutil.copytree(source, half)
    metadata = json.loads((source / "metadata.json").read_text())
    for name, entries in metadata["speakers"].items():
        metadata["speakers"][name] = entries[::2]
    (half / "metadata.json").write_text(json.dumps(metadata))


def kill_often(case: Case, command: list[str], folder: Path, begin: Path | None) -> Result:
    """Kill a command that writes to a folder at random moments, and continue it.

    Args:
        case: Counts, and draws the moments.
        command: The command.
        folder: Where it writes.
        begin: A set that is there before; None for nothing.
    """

    def restart() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        if begin is not None:
            shutil.copytree(begin, folder)

    restart()
    subprocess.run(command, check=True, capture_output=True)
    expected = contents(folder)
    assert verify_shards(folder, deep=True, against=case.source).intact
    old = {} if begin is None else contents(begin)
    tars = {name: sha for name, sha in old.items() if name.endswith(".tar")}
    shards = len(list(folder.glob("*.tar"))) - len(tars)
    killed, identical, kept = 0, 0, 0
    for _ in bar(range(case.counts["kills"]), "kills"):
        restart()
        # Start again if the command ended before the kill.
        while not kill_once(command, folder, case.rng, shards):
            restart()
        killed += 1
        if case.rng.random() < 0.5:
            killed += kill_once(command, folder, case.rng, shards)
        kept += len(list(folder.glob(f"{WORK_FOLDER}/*.tar")))
        whole = tars.items() <= contents(folder).items()
        if (folder / MANIFEST_NAME).exists():
            whole &= opens(folder)
        subprocess.run(command, check=True, capture_output=True)
        identical += whole and contents(folder) == expected
    return {
        "asked": case.counts["kills"],
        "kills": killed,
        "identical": identical,
        "finished_shards_kept": kept,
    }


def kill_once(command: list[str], folder: Path, rng: random.Random, shards: int) -> bool:
    """Start a build and kill it when some of its shards are done; whether it was still running."""
    enough = rng.randrange(shards)
    with subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as build:
        while build.poll() is None and len(list(folder.glob(f"{WORK_FOLDER}/*.tar"))) < enough:
            time.sleep(0.002)
        # With no shard done, kill it while it starts; else within the next shard or two.
        time.sleep(rng.uniform(0, 0.1 if enough else 1.0))
        alive = build.poll() is None
        # If only the parent is killed, its workers must end by themselves.
        with suppress(ProcessLookupError):
            (os.killpg if rng.random() < 0.5 else os.kill)(build.pid, signal.SIGKILL)
    end = time.monotonic() + 30
    while group(build.pid) and time.monotonic() < end:
        time.sleep(0.01)
    assert not group(build.pid), "workers were left behind"
    return alive


def refusals(case: Case) -> Result:
    """Let each call that changes the disk fail, one in each build."""
    results: Result = {}
    options = BuildOptions(dtype=case.dtype, samples_per_shard=SAMPLES_PER_SHARD, workers=1)
    expected = contents(case.intact)
    step = 0
    for name, number in (("ENOSPC", errno.ENOSPC), ("EIO", errno.EIO)):
        errors = unseen = identical = 0
        for step in bar(itertools.count(1), name):
            folder = case.work / "refusals"
            shutil.rmtree(folder, ignore_errors=True)
            with refusing(step, number) as calls:
                try:
                    build_shards(case.source, folder, options)
                except StorageError:
                    errors += 1
                else:
                    unseen += calls.made >= step
            if calls.made < step:
                break
            build_shards(case.source, folder, options)
            identical += contents(folder) == expected
        results[name] = {
            "asked": step - 1,
            "errors": errors,
            "made_no_difference": unseen,
            "identical": identical,
        }
    return results


def drops(case: Case) -> Result:
    """Overwrite random pieces of random shards, and repair the set in both ways."""
    expected = contents(case.intact)
    identical = consistent = dropped = nothing_left = 0
    for _ in bar(range(case.counts["drops"]), "drops"):
        folder = case.copy("drops")
        for _ in range(case.rng.randint(1, 6)):
            files = [path for path in files_of(folder) if path.suffix in (".tar", ".npy")]
            path = case.rng.choice(files)
            with open(path, "r+b") as file:
                file.seek(case.rng.randrange(path.stat().st_size))
                file.write(case.rng.randbytes(case.rng.choice((1, 100, 20_000))))
        copy = case.work / "dropped"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        repair_shards(folder, source=case.source)
        identical += contents(folder) == expected
        try:
            report = repair_shards(copy, drop=True)
        except BuildError:
            # All utterances of a split were damaged.
            nothing_left += 1
            continue
        dropped += len(report.dropped)
        # An utterance that is damaged in index and shard is listed without its key.
        nameless = any(not reject.key for reject in report.dropped)
        against = None if nameless else case.source
        consistent += verify_shards(copy, deep=True, against=against).intact
    return {
        "asked": case.counts["drops"],
        "identical_with_source": identical,
        "intact_without": consistent,
        "nothing_left": nothing_left,
        "dropped": dropped,
    }


PARTS: dict[str, Callable[[Case], Result]] = {
    "flips": flips,
    "truncations": truncations,
    "kills": kills,
    "appends": appends,
    "refusals": refusals,
    "drops": drops,
}


def is_held(part: str, result: Result) -> bool:
    """Whether everything was noticed and nothing lost."""
    if part == "flips":
        return set(result["found"].values()) == {result["asked"]}
    if part == "truncations":
        return result["found"] == result["refused_on_opening"] == result["asked"]
    if part in ("kills", "appends"):
        return result["identical"] == result["asked"] <= result["kills"]
    if part == "refusals":
        return all(
            one["errors"] + one["made_no_difference"] == one["identical"] == one["asked"]
            for one in result.values()
        )
    without = result["intact_without"] + result["nothing_left"]
    return result["identical_with_source"] == without == result["asked"]


def bar(items: Any, label: str) -> Any:
    """A progress bar if stderr is a terminal."""
    return tqdm(items, desc=label, disable=None)


@click.command()
@click.option(
    "--dataset",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Data.  [default: synthesised]",
)
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(list(PARTS)),
    default=tuple(PARTS),
    help="Do only these parts.",
)
@click.option("--dtype", type=click.Choice(get_args(DType)), default="float16", show_default=True)
@click.option("--flips", type=click.IntRange(1), default=2000, show_default=True)
@click.option("--truncations", type=click.IntRange(1), default=500, show_default=True)
@click.option("--kills", type=click.IntRange(1), default=100, show_default=True)
@click.option("--drops", type=click.IntRange(1), default=100, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Result (JSON).")
def main(
    dataset: Path | None,
    only: tuple[str, ...],
    dtype: DType,
    seed: int,
    out: Path | None,
    **counts: int,
) -> None:
    """Damage shard sets and disturb builds, and count what is noticed and what is lost.

    Exit codes: 0 all was noticed and nothing lost, 1 otherwise, 2 usage.
    """
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        work = Path(folder)
        if dataset is None:
            sample = work / "sample"
            dataset = sample / "Dataset"
            command = [sys.executable, "-m", "scripts.synthetic"]
            size = ["--speakers", "6", "--utterances", "40", "--frames-min", "20"]
            size += ["--test-utterances", "40", "--frames-max", "300", "--seed", str(seed)]
            subprocess.run([*command, str(sample), *size], check=True)
        case = Case(dataset, work, random.Random(seed), counts, dtype)
        results: Result = {}
        for part in only:
            began = time.monotonic()
            results[part] = PARTS[part](case)
            results[part]["held"] = is_held(part, results[part])
            results[part]["seconds"] = round(time.monotonic() - began, 1)
            click.echo(f"{part}: {json.dumps(results[part])}")
    report = {"machine": msgspec.to_builtins(machine()), "seed": seed, "dtype": dtype}
    report["parts"] = results
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(0 if all(result["held"] for result in results.values()) else 1)


if __name__ == "__main__":
    main()
