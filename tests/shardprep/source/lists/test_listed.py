"""Lists of matrices: what a CSV, TSV or JSON Lines says is what the shards hold."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from shardprep import (
    BuildError,
    BuildReport,
    ShardWriter,
    SourceError,
    open_shards,
    repair_shards,
    verify_shards,
)
from shardprep.source.scan import scan_source

HEADER = ["path", "speaker", "split"]


def rows_of(root: Path) -> list[list[str]]:
    """Write 14 matrices, `.pt` and `.npy`, and give the rows that list them."""
    rng = np.random.default_rng(0)
    (root / "sub").mkdir(parents=True)
    rows = []
    for number in range(14):
        mel = rng.normal(size=(4 + number, 6)).astype(np.float32)
        name = f"{'sub/' * (number % 3 == 0)}u{number:02d}{'.npy' if number % 2 else '.pt'}"
        np.save(root / name, mel) if number % 2 else torch.save(torch.from_numpy(mel), root / name)
        split = {3: "val", 4: "train", 5: "test"}.get(number, "")
        rows.append([name, "" if number > 11 else ("zoe", "ann")[number % 2], split])
    return rows


def write_list(path: Path, rows: list[list[str]], header: list[str] = HEADER) -> Path:
    """Write rows as the suffix says."""
    if path.suffix == ".jsonl":
        objects = [{k: v or None for k, v in zip(header, row, strict=True)} for row in rows]
        path.write_text("".join(json.dumps(line) + "\n" for line in objects))
    else:
        mark = "\t" if path.suffix == ".tsv" else ","
        path.write_text("".join(mark.join(row) + "\n" for row in [header, *rows]))
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_every_row_is_packed_where_it_belongs(
    tmp_path: Path, build: Callable[..., BuildReport], suffix: str
) -> None:
    rows = rows_of(tmp_path / "data")
    listed = write_list(tmp_path / "data" / f"list{suffix}", rows)
    build(listed, tmp_path / "s", dtype="float32", val_fraction=0.2)
    shards = open_shards(tmp_path / "s")
    assert shards.speakers == ("ann", "zoe")
    assert shards.manifest.n_mels == 6
    assert shards["test"].keys.tolist() == ["u05", "sub/u12", "u13"]
    assert shards["test"].labels.tolist() == [0, -1, -1]
    found: dict[str, Any] = {}
    for name, split in shards.items():
        for index, key in enumerate(split.keys.tolist()):
            label = split.labels[index]
            found[key] = name, "" if label < 0 else shards.speakers[label], split.read(index)
    assert len(found) == len(rows)
    for path, speaker, split in rows:
        name, packed_speaker, mel = found[path.rsplit(".", 1)[0]]
        assert packed_speaker == speaker
        assert name in ((split,) if split else ("train", "val") if speaker else ("test",))
        whole = tmp_path / "data" / path
        original = np.load(whole) if path.endswith(".npy") else torch.load(whole).numpy()
        np.testing.assert_array_equal(mel, original)


def test_lists_of_every_kind_and_a_program_give_the_same_shards(
    tmp_path: Path,
    build: Callable[..., BuildReport],
    contents: Callable[[Path], dict[str, str]],
) -> None:
    rows = rows_of(tmp_path / "data")
    for suffix in (".csv", ".jsonl"):
        listed = write_list(tmp_path / "data" / f"list{suffix}", rows)
        build(listed, tmp_path / suffix, samples_per_shard=3)
    with ShardWriter(tmp_path / "program", 6, samples_per_shard=3, workers=1) as writer:
        for path, speaker, split in rows:
            whole = tmp_path / "data" / path
            mel: Any = np.load(whole) if path.endswith(".npy") else torch.load(whole)
            writer.add(path.rsplit(".", 1)[0], mel, speaker or None, split or None)  # type: ignore[arg-type]
    csv, lines, program = (contents(tmp_path / n) for n in (".csv", ".jsonl", "program"))
    assert csv == lines
    assert {n: h for n, h in csv.items() if n != "manifest.json"}.items() >= {
        n: h for n, h in program.items() if n.endswith((".tar", ".npy"))
    }.items()


def test_a_set_of_a_list_is_kept_up_to_date_verified_and_repaired(
    tmp_path: Path,
    build: Callable[..., BuildReport],
    contents: Callable[[Path], dict[str, str]],
) -> None:
    listed = write_list(tmp_path / "data" / "list.csv", rows_of(tmp_path / "data"))
    build(listed, tmp_path / "s")
    assert build(listed, tmp_path / "s").up_to_date
    assert verify_shards(tmp_path / "s", against=listed).intact
    before = contents(tmp_path / "s")
    shard = tmp_path / "s" / "train-000000.tar"
    data = bytearray(shard.read_bytes())
    data[800:1000] = bytes(200)
    shard.write_bytes(data)
    assert repair_shards(tmp_path / "s", source=listed).intact
    assert contents(tmp_path / "s") == before
    np.save(tmp_path / "data" / "u01.npy", np.load(tmp_path / "data" / "u01.npy") + 1)
    with pytest.raises(BuildError, match=r"1 of 14 files .* such as u01\.npy"):
        build(listed, tmp_path / "s")
    (fault,) = verify_shards(tmp_path / "s", against=listed).faults
    assert (fault.key, "u01.npy" in fault.what) == ("u01", True)


def test_spreadsheets_may_write_it(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    text = "\r\n".join(";".join(f'"{value}"' for value in row) for row in [HEADER, *rows])
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "list.csv").write_bytes(f"{text}\r\n\r\n".encode(encoding))
        source = scan_source(tmp_path / "list.csv")
        assert (len(source.labelled), len(source.test), source.rejects) == (9, 3, ())


def test_keys_and_frames_may_be_listed(tmp_path: Path) -> None:
    (name, *_), *_ = rows_of(tmp_path)
    header = [*HEADER, "frames", "key", "gender"]
    listed = write_list(tmp_path / "l.csv", [[name, "ann", "", "4", "folder/a b", "f"]], header)
    (utterance,) = scan_source(listed).labelled
    assert (utterance.key, utterance.frames) == ("folder/a b", 4)


def test_pandas_may_write_it(tmp_path: Path) -> None:
    """Its whole numbers are 4.0 where another row has none; its speakers may be numbers."""
    (name, *_), (other, *_), *_ = rows_of(tmp_path)
    header = ["path", "speaker", "frames"]
    csv = write_list(tmp_path / "l.csv", [[name, "7", "4.0"], [other, "8", ""]], header)
    lines = [{"path": name, "speaker": 7, "frames": 4.0}, {"path": other, "speaker": 8}]
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for listed in (csv, tmp_path / "l.jsonl"):
        source = scan_source(listed)
        assert source.speakers == ("7", "8")
        assert [utterance.frames for utterance in source.labelled] == [4, 0]


def test_messages_name_the_key_that_a_list_gives(tmp_path: Path) -> None:
    header = ["path", "speaker", "key"]
    listed = write_list(tmp_path / "l.csv", [["gone.npy", "ann", "talk-7"]], header)
    with pytest.raises(
        SourceError, match=r"gone\.npy: talk-7: speaker ann: the file does not exist"
    ):
        scan_source(listed)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (["", "ann", ""], "the path is empty"),
        (["missing.npy", "ann", ""], "the file does not exist"),
        (["../u09.npy", "ann", ""], r"leads outside the data set; .* the folder of list\.csv"),
        (["u01.wav", "ann", ""], r"does not end in \.pt or \.npy but in \.wav, which is audio"),
        (["u01.npy", "ann", "dev"], "the split is 'dev', expected train, val, test or nothing"),
        (["u01.npy", "", "train"], "has no speaker, which the split train needs"),
        (["u01.npy", "a" * 301, ""], "the speaker is not valid Unicode"),
        (["u03.npy", "ann", ""], "lists the same file as line 2"),
        (["u03.pt", "ann", ""], "has the key of line 2, u03"),
        (["a.b.npy", "ann", ""], r"has a dot before \.npy.*such as to a-b\.npy"),
    ],
)
def test_a_faulty_row_is_named_with_its_line_or_left_out(
    tmp_path: Path, build: Callable[..., BuildReport], row: list[str], said: str
) -> None:
    for name in ("u01.npy", "u03.npy", "a.b.npy"):
        np.save(tmp_path / name, np.ones((3, 4), np.float32))
    torch.save(torch.ones(3, 4), tmp_path / "u03.pt")
    listed = write_list(tmp_path / "list.csv", [["u03.npy", "ann", ""], row])
    with pytest.raises(SourceError, match=said) as caught:
        build(listed, tmp_path / "s")
    assert "(line 3 of list.csv)" in str(caught.value)
    report = build(listed, tmp_path / "s", on_error="skip")
    assert [reject.file for reject in report.rejects] == [row[0]]
    assert open_shards(tmp_path / "s")["train"].keys.tolist() == ["u03"]


@pytest.mark.parametrize("frames", ["0", "-3", "2.5", "many"])
def test_faulty_lengths_are_named(tmp_path: Path, frames: str) -> None:
    np.save(tmp_path / "a.npy", np.ones((3, 4), np.float32))
    header = [*HEADER, "frames"]
    listed = write_list(tmp_path / "l.csv", [["a.npy", "ann", "", frames]], header)
    with pytest.raises(SourceError, match="frames is .*expected a whole number from 1"):
        scan_source(listed)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("l.csv", b"", "empty"),
        ("l.csv", b"u01.npy,ann\n", r"line 1 is 'u01.npy,ann', expected a header"),
        ("l.csv", b"path,spk\na.npy,ann\n", "the column speaker is missing"),
        ("l.csv", b"path,speaker,path\n", "has the column path twice"),
        ("l.csv", b"path,speaker\na.npy\n", "line 2 has 1 values, expected 2"),
        ("l.csv", b'path,speaker\n"a.npy,ann\n', "line 2 is no row"),
        ("l.csv", b"path,speaker\n", "lists no utterance"),
        ("l.csv", b"path,speaker\na.npy,\xe9\n", r"not UTF-8 text \(line 2, byte 19\)"),
        ("l.csv", b"\x1f\x8b\x08\x00rest", "gzip|compressed"),
        ("l.csv", b"<!DOCTYPE html><html></html>", "page"),
        ("l.jsonl", b"\n\n", "lists no utterance|empty"),
        ("l.jsonl", b'{"path": "a.npy"}\n', "line 1: .*missing required field `speaker`"),
        ("l.jsonl", b'{"path": 3, "speaker": ""}\n', "line 1: Expected `str`, got `int`"),
        ("l.jsonl", b'{"path": "a", "speaker": null}\n{"pa', "line 2: "),
        ("l.jsonl", b"[" * 100_000, "line 1: "),
        ("l.tsv", b"path,speaker\n", r"line 1 is 'path,speaker', expected a header"),
    ],
)
def test_a_faulty_list_is_named(tmp_path: Path, name: str, text: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(text)
    with pytest.raises(SourceError, match=said):
        scan_source(tmp_path / name)


def test_what_is_no_list_is_named(tmp_path: Path) -> None:
    (tmp_path / "l.csv").mkdir()
    with pytest.raises(SourceError, match="is a folder, expected a list"):
        scan_source(tmp_path / "l.csv")
    with pytest.raises(SourceError, match="does not exist"):
        scan_source(tmp_path / "missing.csv")


def test_a_file_with_two_speakers_is_not_packed(
    tmp_path: Path, build: Callable[..., BuildReport]
) -> None:
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", np.ones((3, 4), np.float32))
    rows = [["a.npy", "ann", ""], ["b.npy", "ann", ""], ["a.npy", "bob", ""], ["a.npy", "ann", ""]]
    report = build(write_list(tmp_path / "l.csv", rows), tmp_path / "s", on_error="skip")
    assert open_shards(tmp_path / "s")["train"].keys.tolist() == ["b"]
    assert sorted(str(reject.speaker) for reject in report.rejects) == ["ann", "ann", "bob"]


def test_other_numbers_of_bins_are_faults(
    tmp_path: Path, build: Callable[..., BuildReport]
) -> None:
    np.save(tmp_path / "a.npy", np.ones((3, 4), np.float32))
    np.save(tmp_path / "b.npy", np.ones((3, 5), np.float32))
    np.save(tmp_path / "c.npy", np.ones((4, 7), np.float32))
    rows = [[f"{name}.npy", "ann", ""] for name in "abc"]
    listed = write_list(tmp_path / "l.csv", rows)
    report = build(listed, tmp_path / "s", on_error="skip")
    assert {r.key: r.reason for r in report.rejects} == {
        "b": "has shape (3, 5), expected (frames, 4)",
        "c": "has shape (4, 7), expected (frames, 4): it is transposed; save array.T",
    }
    build(listed, tmp_path / "five", on_error="skip", n_mels=5)
    assert open_shards(tmp_path / "five")["train"].keys.tolist() == ["b"]


def test_positions_of_test_rows_are_kept_with_those_of_rejects(
    tmp_path: Path, build: Callable[..., BuildReport]
) -> None:
    for name in "ac":
        np.save(tmp_path / f"{name}.npy", np.ones((3, 4), np.float32))
    (tmp_path / "b.npy").write_bytes(b"garbage")
    rows = [[f"{name}.npy", "", ""] for name in "abcd"]
    build(write_list(tmp_path / "l.csv", rows), tmp_path / "s", on_error="skip")
    entries = open_shards(tmp_path / "s").test_entries
    assert [(entry.file, entry.index) for entry in entries] == [
        ("a.pt", 0),
        ("b.pt", None),
        ("c.pt", 1),
        ("d.pt", None),
    ]


def test_links_out_of_the_folder_are_taken_only_when_asked(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((3, 4), np.float32))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.npy").symlink_to(tmp_path / "a.npy")
    listed = write_list(tmp_path / "data" / "l.csv", [["a.npy", "ann", ""]])
    with pytest.raises(SourceError, match="--follow-links"):
        scan_source(listed)
    assert len(scan_source(listed, follow_links=True).labelled) == 1


def test_a_list_may_lie_behind_a_url_with_its_files(
    tmp_path: Path, build: Callable[..., BuildReport], contents: Callable[[Path], dict[str, str]]
) -> None:
    listed = write_list(tmp_path / "data" / "list.csv", rows_of(tmp_path / "data"))
    store = fsspec.filesystem("memory")
    for path in (p for p in listed.parent.rglob("*") if p.is_file()):
        store.pipe(f"/lists/{path.relative_to(listed.parent)}", path.read_bytes())
    build("memory://lists/list.csv", tmp_path / "remote")  # type: ignore[arg-type]
    build(listed, tmp_path / "local")
    assert contents(tmp_path / "remote") == contents(tmp_path / "local")
    assert verify_shards(tmp_path / "local", against="memory://lists/list.csv").intact


def test_the_command_takes_lists(tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    listed = write_list(tmp_path / "data" / "list.csv", rows_of(tmp_path / "data"))
    made = run_cli("build", listed, tmp_path / "s", "--workers", "1")
    assert made.returncode == 0, made.stderr
    checked = run_cli("verify", tmp_path / "s", "--against", listed)
    assert checked.returncode == 0, checked.stderr
    shutil.copy(listed, tmp_path / "data" / "list.txt")
    refused = run_cli("build", tmp_path / "data" / "list.txt", tmp_path / "t")
    assert refused.returncode == 2
    assert ".csv, .tsv, .jsonl, .scp" in refused.stderr
