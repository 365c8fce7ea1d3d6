"""Commands exit as documented, with results on stdout, talk on stderr, and help that helps."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shardprep
from shardprep import cli, open_shards

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def source(make_dataset: Callable[..., Path]) -> Path:
    return make_dataset(speakers=2, utterances=5, test_utterances=2)


def test_module_runs_as_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "shardprep", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"shardprep, version {shardprep.__version__}\n"


@pytest.mark.parametrize("command", [[], *([name] for name in cli.cli.commands)])
def test_help_keeps_its_lines(run_cli: Cli, command: list[str]) -> None:
    done = run_cli(*command, "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout == run_cli(*command, "-h").stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "\b" not in done.stdout
    # A short help that is too long for its line ends in dots.
    assert "..." not in done.stdout.partition("Commands for")[2].partition("Exit codes")[0]
    if not command:
        table = done.stdout.partition("Exit codes, of every command:\n")[2].splitlines()
        codes = [re.findall(r"^    (\d+) +\w|  (\d+)  SIGTERM", line) for line in table]
        found = [int(one or other) for row in codes for one, other in row]
        assert found == [0, 1, 2, 3, 4, 5, 6, 124, 130, 143]
    if command == ["build"]:
        assert "\n    shardprep build Dataset/ shards/\n" in done.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["pack"],
        ["build"],
        ["build", "SOURCE"],
        ["build", "nowhere", "DST"],
        ["build", "SOURCE", "DST", "--dtype", "int8"],
        ["build", "SOURCE", "DST", "--val-fraction", "1"],
        ["build", "SOURCE", "DST", "--samples-per-shard", "0"],
        ["build", "SOURCE", "DST", "--level", "23"],
        ["build", "SOURCE", "DST", "--workers", "-1"],
        ["build", "SOURCE", "DST", "--loud"],
        ["build", "SOURCE", "SOURCE/metadata.json"],
        ["verify", "nowhere"],
        ["inspect", "nowhere"],
        ["verify", "SHARDS", "--against", "nowhere"],
        ["inspect", "SHARDS", "--sample", "nobody"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2_and_writes_nothing(
    run_cli: Cli, source: Path, edge_set: Path, tmp_path: Path, words: list[str]
) -> None:
    places = {"SOURCE": source, "SHARDS": edge_set, "DST": tmp_path / "shards"}
    done = run_cli(
        *(re.sub("SOURCE|SHARDS|DST", lambda m: str(places[m[0]]), word) for word in words)
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Error" in done.stderr
    assert not (tmp_path / "shards").exists()


def unfinished(folder: Path) -> None:
    (folder / ".shardprep-build").mkdir()
    (folder / "manifest.json").unlink()


def other_version(folder: Path) -> None:
    text = (folder / "manifest.json").read_text().replace('"version": 2', '"version": 9')
    (folder / "manifest.json").write_text(text)


def lost_index(folder: Path) -> None:
    (folder / "split=train.index.npy").unlink()


@pytest.mark.parametrize(
    ("damage", "inspected", "verified", "message"),
    [
        (lambda folder: None, 0, 0, ""),
        (lambda folder: (folder / "manifest.json").unlink(), 4, 1, "no manifest.json"),
        (unfinished, 4, 1, "unfinished build"),
        (other_version, 4, 4, "found format 'shardprep' version 9"),
        (lost_index, 1, 1, "split=train.index.npy"),
        (lambda folder: (folder / "train-000001.tar").unlink(), 1, 1, "train-000001.tar"),
    ],
    ids=["intact", "no manifest", "unfinished", "version", "no index", "no shard"],
)
def test_exit_codes_of_reading(
    run_cli: Cli,
    edge_set: Path,
    tmp_path: Path,
    damage: Callable[[Path], Any],
    inspected: int,
    verified: int,
    message: str,
) -> None:
    folder = Path(shutil.copytree(edge_set, tmp_path / "copy"))
    damage(folder)
    done = run_cli("inspect", folder)
    assert done.returncode == inspected
    assert (message in done.stderr) or not inspected
    done = run_cli("verify", folder)
    assert done.returncode == verified
    # Faults are results; a set that cannot be read at all is an error.
    assert message in (done.stderr if verified == 4 else done.stdout)
    assert (f"shardprep repair {folder}" in done.stderr) == (inspected == 1)
    assert ("intact" in done.stdout) == (not verified)


def test_exit_codes_of_building(run_cli: Cli, source: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    assert run_cli("build", source, shards, "--workers", 1).returncode == 0
    again = run_cli("build", source, shards)
    assert again.returncode == 0
    assert "up to date, nothing to do" in again.stdout
    other = run_cli("build", source, shards, "--seed", 1)
    assert other.returncode == 5
    assert "--overwrite" in other.stderr
    assert run_cli("build", source, shards, "--seed", 1, "--overwrite").returncode == 0
    assert run_cli("build", source, source / "metadata.json" / "x").returncode == 6
    (source / "metadata.json").unlink()
    assert run_cli("build", source, tmp_path / "new").returncode == 3


def test_every_option_of_build_reaches_the_manifest(
    run_cli: Cli, source: Path, tmp_path: Path
) -> None:
    words = "--dtype float32 --codec zstd --level 5 --samples-per-shard 3 --val-fraction 0.2"
    words += " --seed 7 --workers 1 --on-error skip"
    assert run_cli("build", source, tmp_path / "shards", *words.split()).returncode == 0
    manifest = open_shards(tmp_path / "shards").manifest
    codec, made = manifest.codec, manifest.build
    assert (manifest.dtype, codec.name, codec.level) == ("float32", "zstd", 5)
    assert (made.seed, made.val_fraction, made.samples_per_shard) == (7, 0.2, 3)
    assert made.on_error == "skip"
    assert max(s.samples for split in manifest.splits.values() for s in split.shards) == 3


def test_summary_tells_splits_hours_and_sizes(run_cli: Cli, source: Path, tmp_path: Path) -> None:
    done = run_cli("build", source, tmp_path / "shards", "--workers", 1)
    frames = open_shards(tmp_path / "shards")["train"].frames.sum()
    (row,) = (line.split() for line in done.stdout.splitlines() if line.startswith("train"))
    assert row[1:4] == ["8", f"{frames:,}", f"{frames / 360_000:.2f}"]
    assert "2 speakers, 0 utterances rejected" in done.stdout
    assert re.search(r"read 12 files, [\d.]+ KiB; shards .* utterances/s, [\d.]+ MB/s", done.stdout)
    assert done.stderr == ""


def test_json_is_all_that_is_on_stdout(run_cli: Cli, source: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    bad = next(source.glob("*.pt"))
    bad.write_bytes(b"garbage")
    dry = run_cli("build", source, shards, "--on-error", "skip", "--dry-run", "--workers", 1)
    assert "checked, nothing written" in dry.stdout
    assert f"{bad.name}: is text that begins 'garbage'" in dry.stderr
    assert not shards.exists()
    done = run_cli("build", source, shards, "--on-error", "skip", "--workers", 1, "--json")
    report = json.loads(done.stdout)
    assert "1 utterance left out" in done.stderr
    assert sum(split["samples"] for split in report["splits"].values()) == 11
    assert [reject["file"] for reject in report["rejects"]] == [bad.name]
    inspected = json.loads(run_cli("inspect", shards, "--json").stdout)
    assert {name: split["samples"] for name, split in inspected["splits"].items()} == {
        name: split["samples"] for name, split in report["splits"].items()
    }
    verified = json.loads(run_cli("verify", shards, "--deep", "--json").stdout)
    assert (verified["intact"], verified["faults"], verified["samples"]) == (True, [], 11)
    (shards / "extra.tar").write_text("")
    done = run_cli("verify", shards, "--json")
    (fault,) = json.loads(done.stdout)["faults"]
    assert done.returncode == 1
    assert (fault["file"], fault["key"]) == ("extra.tar", "")
    assert fault["what"].startswith("does not belong to the set")
    # No repair removes it, so none is recommended.
    for command in ("verify", "repair"):
        done = run_cli(command, shards)
        assert done.returncode == 1
        assert "remove it, or move it elsewhere" in done.stdout
        assert "repair" not in done.stderr
    (shards / "train-000000.tar").write_text("")
    assert "shardprep repair" in run_cli("verify", shards).stderr
    assert "--source SRC" in run_cli("repair", shards).stderr


def test_verify_takes_a_source_to_compare_with(run_cli: Cli, source: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    run_cli("build", source, shards, "--workers", 1)
    assert run_cli("verify", shards, "--against", source).returncode == 0
    lost = next(source.glob("*.pt"))
    lost.unlink()
    done = run_cli("verify", shards, "--against", source)
    assert done.returncode == 1
    assert lost.stem in done.stdout
    assert run_cli("verify", shards, "--against", tmp_path).returncode == 3


def test_inspect_describes_the_set(run_cli: Cli, edge_set: Path) -> None:
    shard_set = open_shards(edge_set)
    about = json.loads(run_cli("inspect", edge_set, "--json").stdout)
    assert (about["n_mels"], about["dtype"], about["speakers"]) == (7, "float16", 3)
    assert about["codec"] == {"name": "none"}
    assert about["fingerprint"] == shard_set.manifest.fingerprint
    for name, split in shard_set.items():
        told = about["splits"][name]
        assert (told["samples"], told["frames"]) == (len(split), split.frames.sum())
        assert told["length_percentiles"]["0"] == split.frames.min()
        assert told["length_percentiles"]["100"] == split.frames.max()
    text = run_cli("inspect", edge_set).stdout
    assert "3 speakers, 7 mels, float16, codec none" in text
    assert re.search(r"^train +28 +3 ", text, re.MULTILINE)
    assert re.search(r"^length in frames +min .* median .* max$", text, re.MULTILINE)
    assert "frames" in text.splitlines()[-1]


@pytest.mark.parametrize(
    "kind", [("float16", "none"), ("float32", "zstd"), ("uint8", "none")], ids="-".join
)
@pytest.mark.parametrize("key", ["ann-004", "cleo-003.pt", "test-000"])
def test_inspect_shows_one_utterance(
    run_cli: Cli, edge_sets: dict[tuple[str, str], Path], kind: tuple[str, str], key: str
) -> None:
    done = run_cli("inspect", edge_sets[kind], "--sample", key, "--json")
    about = json.loads(done.stdout)
    shard_set = open_shards(edge_sets[kind])
    split = shard_set[about["split"]]
    mel = split.read(about["index"]).astype("float32")
    assert about["key"] == key.removesuffix(".pt") == split.keys[about["index"]]
    assert about["frames"] == len(mel)
    assert about["speaker"] == (None if key.startswith("test") else key.partition("-")[0])
    assert (about["min"], about["max"]) == (mel.min(), mel.max())
    assert ("step" in about) == (kind[0] == "uint8")
    if "step" in about:
        assert about["minimum"] == mel.min()
        assert about["step"] == split.step[about["index"]]
    data = (edge_sets[kind] / about["shard"]).read_bytes()
    assert len(data[about["offset"] : about["offset"] + about["nbytes"]]) == about["nbytes"]
    picture = run_cli("inspect", edge_sets[kind], "--sample", key).stdout.split("\n\n")[1]
    rows = picture.splitlines()
    assert {len(row) for row in rows} == {min(72, len(mel))}
    assert len(rows) == 7
    assert set(picture) <= set(" ░▒▓█\n")


@pytest.mark.parametrize(
    "error", [OSError(errno.EMFILE, "Too many open files", "x"), MemoryError()]
)
def test_trouble_that_no_command_expects_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], error: Exception
) -> None:
    def fail(**options: Any) -> None:
        raise error

    for name in ("discard_output", "open_closed_streams"):
        monkeypatch.setattr(cli, name, lambda: None)
    monkeypatch.setattr(cli.signal, "signal", lambda *arguments: None)
    monkeypatch.setattr(cli.cli, "main", fail)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 6
    said = capfd.readouterr().err
    assert re.search(r"ulimit -n|Memory is short", said)
    assert "Traceback" not in said
