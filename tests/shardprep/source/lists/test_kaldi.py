"""Features of Kaldi: what kaldiio reads is packed, and nothing that a hostile list names is run."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardprep import BuildReport, SourceError, open_shards, repair_shards, verify_shards
from shardprep.source.lists.ark import ArkReader, parse_entry
from shardprep.source.scan import scan_source

kaldiio = pytest.importorskip("kaldiio")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as make_fbank.sh leaves it: 12 matrices in six arks of every kind."""
    folder = tmp_path / "data" / "train"
    (folder / "data").mkdir(parents=True)
    # Kaldi's paths are relative to the current folder.
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    with open(folder / "feats.scp", "w") as scp, open(folder / "utt2spk", "w") as speakers:
        kinds: list[dict[str, Any]] = [
            {"compression_method": None},
            {"compression_method": None, "double": True},
            {"compression_method": 2},
            {"compression_method": 3},
            {"compression_method": 5},
            {"text": True},
        ]
        for number, options in enumerate(kinds):
            double = options.pop("double", False)
            mels = {
                f"spk{k}-utt{number}": rng.normal(size=(5 + number + k, 4)).astype(
                    np.float64 if double else np.float32
                )
                for k in range(2)
            }
            ark = f"data/train/data/raw.{number}.ark"
            kaldiio.save_ark(ark, mels, scp=str(tmp_path / "part.scp"), **options)
            scp.write((tmp_path / "part.scp").read_text())
            speakers.writelines(f"{key} {key.partition('-')[0]}\n" for key in mels)
    return folder


def packed(shards: Path) -> Iterator[tuple[str, str, np.ndarray]]:
    found = open_shards(shards)
    for split in found.values():
        for index, key in enumerate(split.keys.tolist()):
            yield key, found.speakers[split.labels[index]], split.read(index)


def test_every_matrix_is_the_one_that_kaldiio_reads(
    folder: Path, tmp_path: Path, build: Callable[..., BuildReport]
) -> None:
    build(folder, tmp_path / "s", dtype="float32", samples_per_shard=5)
    expected = kaldiio.load_scp(str(folder / "feats.scp"))
    found = {key: (speaker, mel) for key, speaker, mel in packed(tmp_path / "s")}
    assert found.keys() == set(expected)
    for key, (speaker, mel) in found.items():
        assert speaker == key.partition("-")[0]
        np.testing.assert_array_equal(mel, expected[key].astype(np.float32))
    assert verify_shards(tmp_path / "s", against=folder / "feats.scp").intact
    assert build(folder, tmp_path / "s", dtype="float32", samples_per_shard=5).up_to_date


def test_a_set_of_kaldi_is_repaired_to_the_same_bytes(
    folder: Path,
    tmp_path: Path,
    build: Callable[..., BuildReport],
    contents: Callable[[Path], dict[str, str]],
) -> None:
    build(folder, tmp_path / "s")
    before = contents(tmp_path / "s")
    shard = tmp_path / "s" / "train-000000.tar"
    data = bytearray(shard.read_bytes())
    data[600:700] = bytes(100)
    shard.write_bytes(data)
    assert repair_shards(tmp_path / "s", source=folder).intact
    assert contents(tmp_path / "s") == before


@pytest.mark.parametrize("part", ["[0:2]", "[1:3,0:1]", "[2]", "[,1:3]", "[1:3,:]"])
def test_ranges_mean_what_kaldiio_takes_them_for(folder: Path, part: str) -> None:
    first = (folder / "feats.scp").read_text().split("\n")[0].split(" ", 1)[1]
    (folder / "feats.scp").write_text(f"a {first}{part}\n")
    (folder / "utt2spk").write_text("a ann\n")
    source = scan_source(folder)
    ((_, mel),) = source.reader.read(source.labelled, source.n_mels)
    np.testing.assert_array_equal(mel, kaldiio.load_mat(first + part))


@pytest.mark.parametrize("place", ["a.ark", "a.ark:12", "C:a.ark:0[3:4]", "a b.ark:7[1:2,3:4]"])
def test_places_mean_what_kaldiio_takes_them_for(place: str) -> None:
    file, offset, slices = kaldiio.matio._parse_arkpath(place)
    assert parse_entry(place) == (file, offset or 0, slices or ())


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("cat raw.ark |", "is a command, and commands are not executed"),
        ("| cat raw.ark", "is a command, and commands are not executed"),
        ("touch PWNED; gunzip -c raw.ark.gz|", "is a command"),
        ("-", "is no place in a file"),
        ("missing.ark:3", "does not exist"),
        ("../../outside.ark:0", "lies out of the folder.*--follow-links"),
        ("/dev/zero:0", "lies out of the folder"),
        ("data/train/data:0", "a folder"),
        ("data/train/data/raw.0.ark:99999999", "begins at byte 99999999 of a file of"),
        ("data/train/data/raw.0.ark:3", "no matrix of Kaldi"),
        ("data/train/data/raw.0.ark:8[5:x]", "no place in a file|no range|does not exist"),
        ("data/train/data/raw.0.ark:10[70:80]", "expected numbers"),
    ],
)
def test_entries_that_cannot_be_read_safely_are_named(
    folder: Path, tmp_path: Path, build: Callable[..., BuildReport], entry: str, said: str
) -> None:
    with open(folder / "feats.scp", "a") as scp, open(folder / "utt2spk", "a") as speakers:
        scp.write(f"bad {entry}\n")
        speakers.write("bad spk0\n")
    kaldiio.save_ark(str(tmp_path / "outside.ark"), {"k": np.ones((3, 4), np.float32)})
    with pytest.raises(SourceError, match=said):
        build(folder, tmp_path / "s")
    report = build(folder, tmp_path / "s", on_error="skip")
    assert [reject.key for reject in report.rejects] == ["bad"]
    assert len(list(packed(tmp_path / "s"))) == 12
    assert not list(tmp_path.rglob("PWNED"))


class Exploit:
    def __reduce__(self) -> Any:
        return print, ("PWNED",)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"PKL" + pickle.dumps(Exploit()), "no matrix of Kaldi"),
        (b"NPY\x01\x10" + bytes(16), "no matrix of Kaldi"),
        (b"\0BFM \x04" + struct.pack("<i", 2**31 - 1) + b"\x04" + struct.pack("<i", 4), "ends ear"),
        (b"\0BCM3 " + struct.pack("<ffii", 0, 1, 2**31 - 1, 2**31 - 1), "ends early"),
        (b"\0BFM \x04" + struct.pack("<i", -5) + b"\x04" + struct.pack("<i", 4), "says -5 x 4"),
        (b"\0BFV \x04" + struct.pack("<i", 1) + bytes(4), "a FV, no matrix"),
        (b"\0BFM \x04", "within its head"),
        (b" [ 1 2 3 4\n 5 6 7 8", "has no ]"),
        (b" [ 1 2\n 3 ]\n", "no matrix in text"),
        (b" [ 1 2 3 nan ]\n", "not finite"),
        (b"", "begins at byte 0 of a file of 0"),
    ],
)
def test_hostile_arks_are_named_and_nothing_is_unpickled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: bytes, said: str
) -> None:
    (tmp_path / "a.ark").write_bytes(data)
    (tmp_path / "feats.scp").write_text("a a.ark:0\n")
    (tmp_path / "utt2spk").write_text("a ann\n")
    with pytest.raises(SourceError, match=said):
        scan_source(tmp_path)
    assert "PWNED" not in capsys.readouterr().out


def test_text_without_a_decimal_point_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.ark").write_bytes(b"a  [\n  1 2.5 \n  3 4 ]\n")
    (tmp_path / "feats.scp").write_text("a a.ark:2\n")
    (tmp_path / "utt2spk").write_text("a ann\n")
    source = scan_source(tmp_path)
    ((_, mel),) = source.reader.read(source.labelled, 2)
    np.testing.assert_array_equal(mel, [[1, 2.5], [3, 4]])


def test_arks_elsewhere_are_taken_when_asked(
    folder: Path, tmp_path: Path, build: Callable[..., BuildReport]
) -> None:
    kaldiio.save_ark(
        str(tmp_path / "mfcc.ark"),
        {"a": np.ones((3, 4), np.float32)},
        scp=str(folder / "feats.scp"),
    )
    (folder / "utt2spk").write_text("a ann\n")
    with pytest.raises(SourceError, match="--follow-links"):
        scan_source(folder)
    build(folder, tmp_path / "s", follow_links=True)
    assert [key for key, *_ in packed(tmp_path / "s")] == ["a"]


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("utt2spk", None, "utt2spk: does not exist"),
        ("utt2spk", "spk0-utt0\n", "line 1 has one column, expected two"),
        ("utt2spk", "a b\na c\n", "line 2 has the utterance a of line 1 again"),
        ("utt2spk", "a b\n", "spk0-utt0 is not in utt2spk"),
        ("feats.scp", "", "lists no utterance"),
        ("feats.scp", "a.b data/raw.0.ark:3\n", "the key has a dot.*such as a-b"),
        ("feats.scp", b"\xff\n", "not UTF-8"),
    ],
)
def test_faulty_files_are_named(folder: Path, file: str, text: Any, said: str) -> None:
    if text is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SourceError, match=said):
        scan_source(folder)


def test_the_reader_pickles_for_worker_processes(folder: Path) -> None:
    reader = scan_source(folder).reader
    assert pickle.loads(pickle.dumps(reader)) == ArkReader(folder)


@pytest.mark.parametrize("file", ["feats.scp", "utt2spk", "list.csv"])
def test_far_too_many_rows_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    monkeypatch.setattr("shardprep.source.lists.place._MOST_ROWS", 20)
    head = "path,speaker\n" if file == "list.csv" else ""
    mark = "," if file == "list.csv" else " "
    (folder / file).write_text(head + "".join(f"u{n}{mark}a\n" for n in range(21)))
    with pytest.raises(SourceError, match=f"{file}: has more than 20 rows"):
        scan_source(folder / file if file == "list.csv" else folder)
