"""A fault in one of the three JSON files stops the build, whatever --on-error says."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., subprocess.CompletedProcess[str]]
Edit = Callable[[Path], None]
META, MAPPING, TEST = "metadata.json", "mapping.json", "testdata.json"


def text(file: str, content: str | bytes) -> Edit:
    data = content if isinstance(content, bytes) else content.encode()

    def edit(root: Path) -> None:
        (root / file).write_bytes(data)

    return edit


def change(file: str, **values: Any) -> Edit:
    def edit(root: Path) -> None:
        content = json.loads((root / file).read_text())
        content.update(values)
        (root / file).write_text(json.dumps(content))

    return edit


def without(file: str, key: str) -> Edit:
    def edit(root: Path) -> None:
        content = json.loads((root / file).read_text())
        del content[key]
        (root / file).write_text(json.dumps(content))

    return edit


def into_folder(root: Path) -> None:
    (root / META).unlink()
    (root / META).mkdir()


def one_folder_deeper(root: Path) -> None:
    (root / "Dataset").mkdir()
    (root / META).rename(root / "Dataset" / META)


def surrogate_speaker(root: Path) -> None:
    change(META, speakers={"\ud800": []})(root)
    (root / MAPPING).unlink()


def shard_set_instead(root: Path) -> None:
    (root / META).unlink()
    (root / "manifest.json").write_text("{}")


def dvc_instead(root: Path) -> None:
    (root / META).rename(root / f"{META}.dvc")


def dangling(file: str, target: str) -> Edit:
    def edit(root: Path) -> None:
        (root / file).unlink()
        (root / file).symlink_to(target)

    return edit


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 29834\n"
NUMBERS = "does not number its 2 speakers 0 to 1"

FILE_FAULTS: dict[str, tuple[Edit, str, str]] = {
    "no metadata": (lambda root: (root / META).unlink(), META, "does not exist. The folder must"),
    "the folder above": (one_folder_deeper, META, "Dataset, which has one."),
    "metadata a folder": (into_folder, META, "cannot be read"),
    "the shard set": (shard_set_instead, META, "Dataset seems to be a shard set: name the data"),
    "empty": (text(META, ""), META, "is empty (0 bytes)"),
    "zeros": (text(META, bytes(9000)), META, "holds nothing but zero bytes"),
    "LFS pointer": (text(META, LFS), META, "is a Git LFS pointer, not the file: run `git lfs pull"),
    "web page": (text(META, "<html><title>Sign in</title>"), META, "is a web page (its title: 'Si"),
    "server's answer": (
        text(META, '{"message": "Not Found", "status": 404}'),
        META,
        "is an error message of a server ('Not Found'), not the file",
    ),
    "compressed": (text(META, gzip.compress(b"{}")), META, "is compressed with gzip"),
    "broken JSON": (text(META, '{"n_mels": 40, "speakers": {'), META, "column 29): it ends early"),
    "DVC file beside": (dvc_instead, META, "does not exist, but metadata.json.dvc does: run `dvc"),
    "not UTF-8": (text(META, b'{"\xff\xfe\xff": 1}'), META, "is not valid JSON"),
    "deep nesting": (text(META, "[" * 200_000), META, "is not valid JSON"),
    "huge number": (text(META, "1" * 5000), META, "is not valid JSON"),
    "duplicate key": (
        text(META, '{"n_mels": 40, "speakers": {"id1": [], "id1": []}}'),
        META,
        "the key 'id1' occurs twice",
    ),
    "a list": (text(META, "[]"), META, "is a list, expected a JSON object"),
    "no n_mels": (without(META, "n_mels"), META, "n_mels: is missing, expected a whole number"),
    "n_mels a string": (change(META, n_mels="40"), META, "n_mels: is the text '40', expected a wh"),
    "n_mels a bool": (change(META, n_mels=True), META, "n_mels: is true, expected a whole number"),
    "n_mels a fraction": (change(META, n_mels=40.5), META, "n_mels: is 40.5, expected a whole"),
    "n_mels 0": (change(META, n_mels=0), META, "n_mels: is 0, expected 1 to"),
    "n_mels huge": (change(META, n_mels=10**9), META, "n_mels: is 1000000000, expected 1 to"),
    "no speakers": (without(META, "speakers"), META, "speakers: is missing, expected an object"),
    "speakers a list": (change(META, speakers=[]), META, "speakers: is a list, expected an object"),
    "a speaker no list": (
        change(META, speakers={"id00000": {}}),
        META,
        "speakers.id00000: is an object, expected a list of utterances",
    ),
    "speaker not Unicode": (surrogate_speaker, META, "not valid Unicode"),
    "no utterance": (change(META, speakers={"id00000": []}), META, "lists no utterance"),
    "mapping broken": (text(MAPPING, "{"), MAPPING, "is not valid JSON"),
    "mapping without table": (text(MAPPING, "{}"), MAPPING, "speaker2id: is missing, expected an"),
    "mapping not fetched": (
        dangling(MAPPING, "../.git/annex/objects/x"),
        MAPPING,
        "is not here: run `git annex get`",
    ),
    "mapping with a gap": (
        text(MAPPING, '{"speaker2id": {"id00000": 0, "id00001": 2}}'),
        MAPPING,
        NUMBERS,
    ),
    "mapping with a number twice": (
        text(MAPPING, '{"speaker2id": {"id00000": 1, "id00001": 1}}'),
        MAPPING,
        NUMBERS,
    ),
    "mapping negative": (
        text(MAPPING, '{"speaker2id": {"id00000": -1, "id00001": 0}}'),
        MAPPING,
        NUMBERS,
    ),
    "mapping with a bool": (
        text(MAPPING, '{"speaker2id": {"id00000": false, "id00001": true}}'),
        MAPPING,
        "speaker2id has false where a whole number is expected",
    ),
    "mapping with a speaker twice": (
        text(MAPPING, '{"speaker2id": {"id00000": 0, "id00000": 1}}'),
        MAPPING,
        "'id00000' occurs twice",
    ),
    "mapping not Unicode": (
        text(MAPPING, '{"speaker2id": {"id00000": 0, "\\ud800": 1}}'),
        MAPPING,
        "not valid Unicode",
    ),
    "id2speaker disagrees": (
        change(MAPPING, id2speaker={"0": "id00001", "1": "id00000"}),
        MAPPING,
        "id2speaker is not the reverse of speaker2id",
    ),
    "id2speaker incomplete": (
        change(MAPPING, id2speaker={"0": "id00000"}),
        MAPPING,
        "id2speaker is not the reverse of speaker2id",
    ),
    "testdata broken": (text(TEST, "nope"), TEST, "is text that begins 'nope', not JSON"),
    "testdata of other width": (change(TEST, n_mels=80), TEST, "n_mels: is 80, but 40 in metadata"),
    "testdata no list": (
        change(TEST, utterances={}),
        TEST,
        "utterances: is an object, expected a list",
    ),
}


@pytest.fixture
def broken(make_dataset: Callable[..., Path], name: str) -> Path:
    root = make_dataset(speakers=2, utterances=2, test_utterances=1)
    FILE_FAULTS[name][0](root)
    return root


@pytest.mark.parametrize("policy", ["fail", "skip"])
@pytest.mark.parametrize("name", FILE_FAULTS)
def test_fault_of_a_file_is_a_source_error_that_names_it(
    broken: Path, name: str, policy: str, tmp_path: Path, run_cli: Cli
) -> None:
    _, file, message = FILE_FAULTS[name]
    if name == "no utterance":
        (broken / TEST).unlink()
    done = run_cli("build", broken, tmp_path / "shards", "--on-error", policy)
    assert done.returncode == 3
    assert done.stderr.startswith(f"error: {broken / file}: ")
    assert message in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "shards").exists()


def test_optional_files_may_be_absent(
    make_dataset: Callable[..., Path], tmp_path: Path, run_cli: Cli
) -> None:
    root = make_dataset(speakers=2, utterances=4, test_utterances=1)
    (root / MAPPING).unlink()
    (root / TEST).unlink()
    done = run_cli("build", root, tmp_path / "shards", "--workers", 1, "--val-fraction", 0.25)
    assert done.returncode == 0
    rows = [line.split()[:2] for line in done.stdout.splitlines()]
    assert ["train", "6"] in rows
    assert ["val", "2"] in rows
    assert "test" not in [row[0] for row in rows if row]


def test_a_data_set_of_faulty_utterances_only_says_so(
    make_dataset: Callable[..., Path], tmp_path: Path, run_cli: Cli
) -> None:
    root = make_dataset(speakers=2, utterances=3, test_utterances=0)
    for path in root.glob("*.pt"):
        path.unlink()
    done = run_cli("build", root, tmp_path / "shards", "--on-error", "skip")
    assert done.returncode == 3
    assert "does not exist (and 5 more utterances like it)" in done.stderr


def test_source_is_only_read(
    make_dataset: Callable[..., Path],
    tmp_path: Path,
    run_cli: Cli,
    contents: Callable[[Path], dict[str, str]],
) -> None:
    root = make_dataset(speakers=2, utterances=2)
    before = contents(root)
    assert run_cli("build", root, tmp_path / "shards", "--workers", 1).returncode == 0
    assert contents(root) == before
    shutil.rmtree(root)
    assert run_cli("verify", tmp_path / "shards", "--deep").returncode == 0
