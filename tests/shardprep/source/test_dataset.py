"""Every fault of a data set has its own clear error, and valid utterances are still packed."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shardprep import SourceError, open_shards
from shardprep.source.dataset import scan_dataset

Entry = dict[str, Any]
Cli = Callable[..., subprocess.CompletedProcess[str]]
TRIPWIRE = "SHARDPREP_TEST_TRIPWIRE"
SKIP = ("--workers", 1, "--on-error", "skip")


class Malicious:
    """Unpickling it would set an environment variable."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.putenv, (TRIPWIRE, "tripped")


def tensor(value: Any) -> Callable[[Path, Entry], None]:
    def edit(root: Path, entry: Entry) -> None:
        path = root / entry["feature_path"]
        torch.save(value(torch.load(path)) if callable(value) else value, path)

    return edit


def raw(data: Callable[[bytes], bytes]) -> Callable[[Path, Entry], None]:
    def edit(root: Path, entry: Entry) -> None:
        path = root / entry["feature_path"]
        path.write_bytes(data(path.read_bytes()))

    return edit


def field(**values: Any) -> Callable[[Path, Entry], None]:
    return lambda root, entry: entry.update(values)


def moved(name: str) -> Callable[[Path, Entry], None]:
    """The file exists under the name in the metadata: only the name is wrong."""

    def edit(root: Path, entry: Entry) -> None:
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (root / entry["feature_path"]).rename(target)
        entry["feature_path"] = name

    return edit


def link_outside(root: Path, entry: Entry) -> None:
    path = root / entry["feature_path"]
    path.rename(root.parent / "outside.pt")
    path.symlink_to(root.parent / "outside.pt")


def folder(root: Path, entry: Entry) -> None:
    path = root / entry["feature_path"]
    path.unlink()
    path.mkdir()


def missing(root: Path, entry: Entry) -> None:
    (root / entry["feature_path"]).unlink()


def set_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda mel: mel.index_fill(0, torch.tensor([3]), value)


UTTERANCE_FAULTS: dict[str, tuple[Callable[[Path, Entry], None], str]] = {
    "missing file": (missing, "does not exist"),
    "garbage": (
        raw(lambda data: b"\1\2\xff" * 99),
        "of torch.save: it begins with the bytes 01 02 ff",
    ),
    "text": (raw(lambda data: b"garbage" * 99), "is text that begins 'garbagegarbage"),
    "empty file": (raw(lambda data: b""), r"is empty \(0 bytes\); copy or download it again"),
    "truncated file": (raw(lambda data: data[:-100]), r"ends early, after \d+ bytes"),
    "malicious pickle": (tensor(Malicious()), "loaded safely: .*(putenv|posix)"),
    "bare malicious pickle": (raw(lambda data: pickle.dumps(Malicious(), 2)), "loaded safely: "),
    "list": (tensor(lambda mel: mel.tolist()), "holds a list, not a tensor"),
    "dict of tensors": (
        tensor(lambda mel: {"mel": mel, "rate": 16000}),
        r"holds a dict, not a tensor \(its keys: 'mel', 'rate'\); .*torch\.load\(FILE\)\['mel'\]",
    ),
    "int tensor": (
        tensor(lambda mel: mel.int()),
        r"holds torch\.int32 .*floating point; save tensor\.float\(\)",
    ),
    "complex tensor": (
        tensor(lambda mel: mel + 0j),
        r"torch\.complex64 .*floating point; save tensor\.abs\(\)",
    ),
    "sparse tensor": (tensor(lambda mel: mel.to_sparse()), r"a sparse tensor; .*to_dense\(\)"),
    "meta tensor": (tensor(lambda mel: mel.to("meta")), r"without numbers \(device meta\)"),
    "wrong width": (tensor(lambda mel: mel[:, :39]), r"has shape \(\d+, 39\), expected"),
    "transposed": (
        tensor(lambda mel: mel.T.contiguous()),
        r"has shape \(40, \d+\), expected .*: it is transposed; save tensor\.T",
    ),
    "one dimension": (tensor(lambda mel: mel.flatten()), r"has shape \(\d+,\), .* a waveform"),
    "three dimensions": (
        tensor(lambda mel: mel[None]),
        r"has shape \(1, \d+, 40\), expected .*; save tensor\.squeeze\(\)",
    ),
    "three dimensions, transposed": (
        tensor(lambda mel: mel.T[None]),
        r"has shape \(1, 40, \d+\), .*: it is transposed; save tensor\.squeeze\(\)\.T",
    ),
    "mel_len lies": (
        tensor(lambda mel: mel[:-1]),
        r"has \d+ frames, but mel_len says \d+; correct mel_len",
    ),
    "NaN": (tensor(set_value(float("nan"))), "not finite"),
    "infinity": (tensor(set_value(float("-inf"))), "not finite"),
    "float16 overflow": (tensor(set_value(7e4)), "beyond the range of float16; use --dtype"),
    "link outside": (link_outside, "a link leads out of the data set; --follow-links takes"),
    "folder": (folder, "not a regular file, but a folder"),
    "parent folder": (moved("../outside.pt"), "leads outside the data set"),
    "hidden parent folder": (moved("sub/../../outside.pt"), "leads outside the data set"),
    "absolute path": (
        field(feature_path="/etc/passwd.pt"),
        "is absolute and leads outside the data set; write paths relative to the folder of",
    ),
    "absolute path of Windows": (
        field(feature_path="C:\\data\\a.pt"),
        "is absolute and leads outside the data set",
    ),
    "key with a dot": (moved("uttr.one.pt"), "a dot before .pt, .* such as to uttr-one.pt"),
    "no .pt": (moved("uttr.npy"), r"does not end in .pt but in .npy; .*torch\.from_numpy"),
    "upper case": (moved("uttr.PT"), r"does not end in .pt but in .PT; rename the file"),
    "space at the end": (moved("uttr.pt "), "the file name ends in a space"),
    "audio": (moved("uttr.flac"), "but in .flac, which is audio; save its log-mels"),
    "no name": (moved("sub/.pt"), "the file has no name before .pt"),
    "long key": (moved(89 * "k" + ".pt"), "has 89 bytes, and a tar takes 88; shorten"),
    "long key in UTF-8": (moved(45 * "é" + ".pt"), "has 90 bytes, and a tar takes 88"),
    "underscores": (moved("a/__one.pt"), 'the file name begins with "__", .*datasets skips'),
    "folder of webdataset's own": (
        moved("__key__/a.pt"),
        'the folder __key__ begins and ends with "__", and webdataset skips',
    ),
    "line feed": (moved("a\nb.pt"), r"has the control character '\\n'; remove it"),
    "null byte": (field(feature_path="a\0b.pt"), r"has the control character '\\x00'"),
    "lone surrogate": (field(feature_path="a\ud800.pt"), "not valid Unicode"),
    "mel_len 0": (field(mel_len=0), "mel_len is 0, expected at least 1"),
    "mel_len negative": (field(mel_len=-5), "mel_len is -5, expected at least 1"),
    "mel_len a string": (field(mel_len="50"), "mel_len is the text '50', expected a whole number"),
    "mel_len a bool": (field(mel_len=True), "mel_len is true, expected a whole number"),
    "mel_len null": (field(mel_len=None), "mel_len is null, expected a whole number"),
    "mel_len NaN": (field(mel_len=float("nan")), "mel_len is NaN, expected a whole number"),
    "mel_len a fraction": (field(mel_len=50.5), "mel_len is 50.5, expected a whole number"),
    "mel_len huge": (field(mel_len=10**30), "mel_len is 1000.*, expected less than"),
    "path a number": (field(feature_path=5), "feature_path is 5, expected a path as text"),
    "no fields": (lambda root, entry: entry.clear(), "the entry has no feature_path"),
    "path empty": (field(feature_path=" "), "feature_path is empty"),
    "no length": (lambda root, entry: entry.pop("mel_len"), "the entry has no mel_len"),
}


@pytest.fixture
def faulty(make_dataset: Callable[..., Path], name: str) -> tuple[Path, Entry]:
    """A data set whose first utterance has the fault `name`, and that utterance's entry."""
    root = make_dataset(speakers=2, utterances=4, test_utterances=2)
    metadata = json.loads((root / "metadata.json").read_text())
    entry = metadata["speakers"]["id00000"][0]
    UTTERANCE_FAULTS[name][0](root, entry)
    (root / "metadata.json").write_text(json.dumps(metadata))
    return root, entry


@pytest.mark.parametrize("name", UTTERANCE_FAULTS)
def test_fault_of_an_utterance_stops_the_build_and_names_the_file(
    faulty: tuple[Path, Entry], name: str, tmp_path: Path, run_cli: Cli
) -> None:
    done = run_cli("build", faulty[0], tmp_path / "shards", "--workers", 1)
    assert done.returncode == 3
    assert done.stdout == ""
    assert re.search(UTTERANCE_FAULTS[name][1], done.stderr)
    named = faulty[1].get("feature_path")
    if isinstance(named, str) and named.isprintable():
        assert str(faulty[0] / named) in done.stderr
    assert "speaker id00000" in done.stderr
    assert "weights_only" not in done.stderr
    assert not (tmp_path / "shards" / "manifest.json").exists()
    assert os.environ.get(TRIPWIRE) is None


@pytest.mark.parametrize("name", UTTERANCE_FAULTS)
def test_fault_of_an_utterance_is_skipped_listed_and_reported(
    faulty: tuple[Path, Entry], name: str, tmp_path: Path, run_cli: Cli
) -> None:
    shards = tmp_path / "shards"
    done = run_cli("build", faulty[0], shards, *SKIP)
    assert done.returncode == 0
    assert "1 utterance left out" in done.stderr
    assert "rejects.jsonl" in done.stderr
    assert "1 utterance rejected" in done.stdout
    (reject,) = map(json.loads, (shards / "rejects.jsonl").read_text().splitlines())
    assert re.search(UTTERANCE_FAULTS[name][1], reject["reason"])
    assert (reject["speaker"], reject["split"]) == ("id00000", "labelled")
    packed = {str(key) for split in open_shards(shards).values() for key in split.keys}
    good = {path.stem for path in faulty[0].glob("uttr-*.pt")} - {reject["key"]}
    assert len(packed) == 9
    assert packed <= good
    assert run_cli("verify", shards, "--deep").returncode == 0
    assert os.environ.get(TRIPWIRE) is None


def test_the_malicious_pickle_of_these_tests_does_run_when_unpickled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tripped: list[str] = []
    monkeypatch.setattr(os, "putenv", lambda name, value: tripped.append(name))
    Malicious().__reduce__()[0](TRIPWIRE, "tripped")
    assert tripped == [TRIPWIRE]


def list_again(root: Path, *names: str, **values: Any) -> str:
    """List the first file of id00000 once more in each of these lists; returns its path."""
    metadata, testdata = (
        json.loads((root / f"{name}.json").read_text()) for name in ("metadata", "testdata")
    )
    entry = metadata["speakers"]["id00000"][0]
    for name in names:
        listed = testdata["utterances"] if name == "test" else metadata["speakers"][name]
        # Another spelling of the same file.
        again = {**entry, "feature_path": f".//{entry['feature_path']}", **values}
        listed.insert(1, again)
    (root / "metadata.json").write_text(json.dumps(metadata))
    (root / "testdata.json").write_text(json.dumps(testdata))
    return str(entry["feature_path"])


@pytest.mark.parametrize(
    ("lists", "reason", "split", "lines"),
    [
        (["id00001"], "the same file is listed 2 times: id00000, id00001", None, 2),
        (["id00000"], "the same speaker lists it again", "labelled", 1),
        (["id00000", "id00001"], "the same file is listed 3 times: id00000, id00000, ", None, 3),
        (["test"], "is entry 1 of testdata.json too, and stays in the test split", "test", 1),
        (["test", "id00001"], "is entry 1 of testdata.json too, and stays", "test", 2),
    ],
)
def test_a_file_that_is_listed_again_is_kept_where_its_label_is_not_in_doubt(
    make_dataset: Callable[..., Path],
    tmp_path: Path,
    run_cli: Cli,
    lists: list[str],
    reason: str,
    split: str | None,
    lines: int,
) -> None:
    root = make_dataset(speakers=2, utterances=4, test_utterances=2)
    path = list_again(root, *lists)
    done = run_cli("build", root, tmp_path / "shards", "--workers", 1)
    assert done.returncode == 3
    assert f"{path}: speaker id00000: {reason}" in done.stderr
    assert "--on-error skip" in done.stderr
    assert run_cli("build", root, tmp_path / "shards", *SKIP).returncode == 0
    shard_set = open_shards(tmp_path / "shards")
    assert [reject.file for reject in shard_set.rejects] == [path] * lines
    assert all(reject.split == "labelled" for reject in shard_set.rejects)
    key = path.removesuffix(".pt")
    found = [name for name, own in shard_set.items() for name in [name] * list(own.keys).count(key)]
    assert len(found) == (0 if split is None else 1)
    assert (split == "test") == ("test" in found)
    if split == "test":
        assert [entry.file for entry in shard_set.test_entries][1] == path


def test_a_test_file_that_is_listed_again_is_no_fault_and_keeps_both_places(
    make_dataset: Callable[..., Path], tmp_path: Path, run_cli: Cli
) -> None:
    root = make_dataset(speakers=2, utterances=4, test_utterances=4)
    text = json.loads((root / "testdata.json").read_text())
    listed = text["utterances"]
    listed[2:2] = [listed[1], listed[0]]
    (root / "testdata.json").write_text(json.dumps(text))
    done = run_cli("build", root, tmp_path / "shards", "--workers", 1)
    assert done.returncode == 0
    assert "note: 2 of 6 entries of testdata.json list a file again" in done.stderr
    assert "left out" not in done.stderr
    assert "0 utterances rejected" in done.stdout
    shard_set = open_shards(tmp_path / "shards")
    paths = [entry["feature_path"] for entry in listed]
    assert [entry.file for entry in shard_set.test_entries] == paths
    assert [entry.index for entry in shard_set.test_entries] == [0, 1, 1, 0, 2, 3]
    assert [(line.entry, line.repeats) for line in shard_set.rejects] == [(2, 1), (3, 0)]
    assert "up to date" in run_cli("build", root, tmp_path / "shards", "--workers", 1).stdout
    # Another order of the same entries is another data set.
    listed.append(listed.pop(0))
    (root / "testdata.json").write_text(json.dumps(text))
    assert run_cli("build", root, tmp_path / "shards", "--workers", 1).returncode == 5


def test_test_entries_of_one_file_that_disagree_about_its_length_are_a_fault(
    make_dataset: Callable[..., Path], tmp_path: Path, run_cli: Cli
) -> None:
    root = make_dataset(speakers=2, utterances=4, test_utterances=2)
    text = json.loads((root / "testdata.json").read_text())
    first = text["utterances"][0]
    text["utterances"].append({**first, "mel_len": first["mel_len"] + 1})
    (root / "testdata.json").write_text(json.dumps(text))
    done = run_cli("build", root, tmp_path / "shards", "--workers", 1)
    assert done.returncode == 3
    lengths = (first["mel_len"] + 1, first["mel_len"])
    assert "mel_len is {}, but {} in entry 0".format(*lengths) in done.stderr
    assert run_cli("build", root, tmp_path / "shards", *SKIP).returncode == 0
    entries = open_shards(tmp_path / "shards").test_entries
    assert [entry.index for entry in entries] == [0, 1, 0]


def test_entries_that_cannot_be_packed_keep_their_places(
    make_dataset: Callable[..., Path], tmp_path: Path, run_cli: Cli
) -> None:
    root = make_dataset(speakers=2, utterances=4, test_utterances=5)
    text = json.loads((root / "testdata.json").read_text())
    listed = text["utterances"]
    # One is missed when the data set is looked at, the other when it is read; one has no path.
    (root / listed[1]["feature_path"]).unlink()
    (root / listed[3]["feature_path"]).write_bytes(b"no tensor")
    listed.insert(2, {"mel_len": 3})
    listed += [listed[1], listed[0]]
    (root / "testdata.json").write_text(json.dumps(text))
    options = (*SKIP, "--samples-per-shard", 1)
    done = run_cli("build", root, tmp_path / "shards", *options)
    assert done.returncode == 0
    assert "note: 1 of 8 entries of testdata.json list a file again" in done.stderr
    entries = open_shards(tmp_path / "shards").test_entries
    paths = [entry.get("feature_path", '{"mel_len": 3}') for entry in listed]
    assert [entry.file for entry in entries] == paths
    assert [entry.index for entry in entries] == [0, None, None, 1, None, 2, None, 0]
    assert "does not exist" in entries[1].reason


def test_speaker_that_the_mapping_lacks_loses_all_utterances(
    make_dataset: Callable[..., Path], tmp_path: Path, run_cli: Cli
) -> None:
    root = make_dataset(speakers=3, utterances=4)
    (root / "mapping.json").write_text(json.dumps({"speaker2id": {"id00002": 0, "id00000": 1}}))
    done = run_cli("build", root, tmp_path / "shards", "--workers", 1)
    assert done.returncode == 3
    assert "speaker id00001 is not in mapping.json (and 3 more utterances like it)" in done.stderr
    assert run_cli("build", root, tmp_path / "shards", *SKIP).returncode == 0
    shard_set = open_shards(tmp_path / "shards")
    assert shard_set.speakers == ("id00002", "id00000")
    assert set(shard_set["train"].labels) == {0, 1}
    lines = (tmp_path / "shards" / "rejects.jsonl").read_text().splitlines()
    assert [json.loads(line)["speaker"] for line in lines] == ["id00001"] * 4


@pytest.mark.parametrize("outside", [True, False])
def test_a_file_is_inside_if_its_real_folder_is(
    source_of: Callable[..., Path], tmp_path: Path, outside: bool
) -> None:
    root = source_of({"ann": [3, 4]})
    real = (tmp_path if outside else root) / "real"
    real.mkdir()
    (root / "linked").symlink_to(real)
    for number in range(2):
        (root / f"ann-00{number}.pt").rename(real / f"ann-00{number}.pt")
    text = (root / "metadata.json").read_text().replace("ann-0", "linked/ann-0")
    (root / "metadata.json").write_text(text)
    source = scan_dataset(root)
    assert len(source.rejects) == (2 if outside else 0)
    assert {reject.reason for reject in source.rejects} <= {
        "a link leads out of the data set; --follow-links takes such files, if you trust the "
        "data set"
    }


def into_a_cache(root: Path) -> None:
    """Make every file of a data set a link out of it, as the cache of the Hugging Face Hub does."""
    blobs = root.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(root.iterdir())):
        path.rename(blobs / f"{number:040x}")
        path.symlink_to(f"../blobs/{number:040x}")


def test_a_data_set_of_links_is_taken_if_asked_for(
    make_dataset: Callable[..., Path],
    tmp_path: Path,
    run_cli: Cli,
    contents: Callable[[Path], dict[str, str]],
) -> None:
    root = make_dataset(speakers=2, utterances=4, test_utterances=2)
    assert run_cli("build", root, tmp_path / "plain", "--workers", 1).returncode == 0
    into_a_cache(root)
    done = run_cli("build", root, tmp_path / "shards", "--workers", 1)
    assert done.returncode == 3
    assert "metadata.json: a link leads out of the data set; --follow-links takes" in done.stderr
    linked = ("--follow-links", "--workers", 1)
    assert run_cli("build", root, tmp_path / "shards", *linked, "--dry-run").returncode == 0
    assert run_cli("build", root, tmp_path / "shards", *linked).returncode == 0
    shards = {
        name: {file: sha for file, sha in contents(tmp_path / name).items() if "tar" in file}
        for name in ("plain", "shards")
    }
    assert shards["plain"] == shards["shards"]
    assert run_cli("verify", tmp_path / "shards", "--against", root).returncode == 3
    words = ("verify", tmp_path / "shards", "--against", root, "--follow-links")
    assert run_cli(*words).returncode == 0
    tar = tmp_path / "shards" / "train-000000.tar"
    before = tar.read_bytes()
    tar.write_bytes(before[:2000] + bytes(len(before) - 2000))
    done = run_cli("repair", tmp_path / "shards", "--source", root)
    assert done.returncode == 3
    assert run_cli("repair", tmp_path / "shards", "--source", root, *linked).returncode == 0
    assert tar.read_bytes() == before


@pytest.mark.parametrize("target", ["pipe", "folder", "/dev/zero"])
def test_only_links_to_regular_files_are_followed(
    source_of: Callable[..., Path], tmp_path: Path, target: str
) -> None:
    root = source_of({"ann": [3, 4]})
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (root / "ann-000.pt").unlink()
    (root / "ann-000.pt").symlink_to(tmp_path / target)
    (reject,) = scan_dataset(root, follow_links=True).rejects
    kind = "a folder" if target == "folder" else "a pipe, a socket or a device"
    assert reject.reason == f"not a regular file, but {kind}"


def test_lengths_may_be_whole_numbers_with_a_fraction(
    make_dataset: Callable[..., Path], build: Callable[..., Any], tmp_path: Path
) -> None:
    root = make_dataset(speakers=2, utterances=3, test_utterances=2)
    before = scan_dataset(root).fingerprint
    for name in ("metadata", "testdata"):
        text = re.sub(
            r'("mel_len": \d+|"n_mels": \d+)', r"\1.0", (root / f"{name}.json").read_text()
        )
        assert ".0" in text
        (root / f"{name}.json").write_text(text)
    mapping = json.loads((root / "mapping.json").read_text())
    mapping["speaker2id"] = {name: float(n) for name, n in mapping["speaker2id"].items()}
    (root / "mapping.json").write_text(json.dumps(mapping))
    assert scan_dataset(root).fingerprint == before


def test_an_error_counts_the_kinds_of_faults(
    make_dataset: Callable[..., Path], tmp_path: Path, run_cli: Cli
) -> None:
    root = make_dataset(speakers=2, utterances=6, test_utterances=0)
    metadata = json.loads((root / "metadata.json").read_text())
    for number, entry in enumerate(metadata["speakers"]["id00001"]):
        if number < 3:
            (root / entry["feature_path"]).unlink()
        else:
            entry["mel_len"] = f"{number}"
    (root / "metadata.json").write_text(json.dumps(metadata))
    done = run_cli("build", root, tmp_path / "shards", "--workers", 1)
    assert done.returncode == 3
    assert (
        "the file does not exist (and 5 more utterances are faulty: 2 like it, 3 of the kind "
        "\"mel_len is the text '...', expected a whole number\"). Correct the data set, or leave "
        "such utterances out with --on-error skip; --dry-run lists all."
    ) in done.stderr


def test_a_dry_run_lists_all_faults_and_their_kinds(
    make_dataset: Callable[..., Path], tmp_path: Path, run_cli: Cli
) -> None:
    root = make_dataset(speakers=2, utterances=6, test_utterances=0)
    files = sorted(root.glob("*.pt"))
    for path in files[:4]:
        torch.save(torch.load(path)[:-1], path)
    files[4].unlink()
    done = run_cli("build", root, tmp_path / "shards", "--workers", 1, "--dry-run")
    assert done.returncode == 3
    lines = done.stderr.splitlines()
    assert sum("frames, but mel_len says" in line and ".pt: has" in line for line in lines) == 4
    assert any(line == f"  {files[4].name}: the file does not exist" for line in lines)
    assert "error: 5 utterances faulty, all listed above:" in lines
    assert "        4 has N frames, but mel_len says N" in lines
    assert "        1 the file does not exist" in lines
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_a_data_set_of_which_no_utterance_can_be_packed_makes_no_set(
    make_dataset: Callable[..., Path], tmp_path: Path, run_cli: Cli, on_error: str
) -> None:
    root = make_dataset(speakers=2, utterances=3, test_utterances=1)
    for path in root.glob("*.pt"):
        path.write_bytes(b"")
    words = ("--workers", 1, "--on-error", on_error)
    done = run_cli("build", root, tmp_path / "shards", *words)
    assert done.returncode == 3
    assert "is empty (0 bytes)" in done.stderr
    assert ("and 6 more utterances like it" in done.stderr) == (on_error == "skip")
    assert not (tmp_path / "shards" / "manifest.json").exists()


def test_labels_are_those_of_mapping_json_or_else_in_sorted_order(
    source_of: Callable[..., Path],
) -> None:
    root = source_of({"cleo": [3], "ann": [4], "bob": [5]})
    assert scan_dataset(root).speakers == ("ann", "bob", "cleo")
    (root / "mapping.json").write_text('{"speaker2id": {"bob": 0, "cleo": 1, "ann": 2}}')
    source = scan_dataset(root)
    assert source.speakers == ("bob", "cleo", "ann")
    assert {u.speaker: u.label for u in source.labelled} == {"bob": 0, "cleo": 1, "ann": 2}


def test_fingerprint_changes_with_everything_that_is_packed(
    make_dataset: Callable[..., Path],
) -> None:
    root = make_dataset(speakers=2, utterances=4)

    def fingerprint() -> str:
        return scan_dataset(root).fingerprint

    before = fingerprint()
    (root / "metadata.json").touch()
    assert fingerprint() == before
    metadata = json.loads((root / "metadata.json").read_text())
    removed = metadata["speakers"]["id00001"].pop()
    (root / "metadata.json").write_text(json.dumps(metadata))
    without = fingerprint()
    metadata["speakers"]["id00000"].append(removed)
    (root / "metadata.json").write_text(json.dumps(metadata))
    assert len({before, without, fingerprint()}) == 3


def test_metadata_may_grow_with_the_number_of_files(
    make_dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_dataset(speakers=2, utterances=20, test_utterances=0)
    size = (root / "metadata.json").stat().st_size
    monkeypatch.setattr("shardprep.format.limits.SMALL_JSON_BYTES", 1000)
    assert size > 1000
    monkeypatch.setattr("shardprep.format.limits.SMALL_JSON_VALUES", 60)
    assert len(scan_dataset(root).labelled) == 40
    # The same metadata with fewer files.
    for path in sorted(root.glob("*.pt"))[2:]:
        path.unlink()
    with pytest.raises(SourceError, match="larger than its files account for"):
        scan_dataset(root)
    monkeypatch.setattr("shardprep.format.limits.SMALL_JSON_BYTES", size)
    with pytest.raises(SourceError, match="larger than its files account for"):
        scan_dataset(root)
