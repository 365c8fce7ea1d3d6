"""Appending to a set gives what opening the set and a build of the new utterances gives."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import random
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardprep import (
    BuildError,
    BuildOptions,
    BuildReport,
    CorruptShardError,
    FormatError,
    OpenShards,
    SourceError,
    append_shards,
    build_shards,
    open_shards,
    repair_shards,
    verify_shards,
)
from shardprep.build.pools.pool import ProgressListener

Contents = Callable[[Path], dict[str, str]]
MELS = 3
LINE = ("file", "key", "speaker", "split", "entry", "repeats")
OPTIONS: dict[str, Any] = {"workers": 1, "samples_per_shard": 2, "val_fraction": 0.3}


@dataclass(frozen=True)
class File:
    """A file of a data set: of a speaker, or a test file; and what is wrong with it."""

    name: str
    speaker: str | None
    frames: int
    fault: str = ""


def mel_of(file: File) -> np.ndarray:
    seed = int.from_bytes(file.name.encode()[-6:], "big")
    return np.random.default_rng(seed).normal(size=(file.frames, MELS)).astype(np.float32)


def write(root: Path, files: Iterable[File], test: Iterable[File] = ()) -> Path:
    """A data set of files; `test` are the entries of testdata.json, which may repeat."""
    root.mkdir(parents=True)
    files, test = list(files), list(test)
    for file in {*files, *test}:
        if file.fault == "garbage":
            (root / f"{file.name}.pt").write_bytes(b"garbage")
        elif file.fault != "missing":
            torch.save(torch.from_numpy(mel_of(file)), root / f"{file.name}.pt")

    def entry(file: File) -> dict[str, Any]:
        return {"feature_path": f"{file.name}.pt", "mel_len": file.frames}

    speakers: dict[str, list[dict[str, Any]]] = {}
    for file in files:
        speakers.setdefault(str(file.speaker), []).append(entry(file))
    (root / "metadata.json").write_text(json.dumps({"n_mels": MELS, "speakers": speakers}))
    listed = {"n_mels": MELS, "utterances": [entry(file) for file in test]}
    (root / "testdata.json").write_text(json.dumps(listed))
    return root


def append(source: Path, shards: Path, **options: Any) -> BuildReport:
    return append_shards(source, shards, BuildOptions(**{"workers": 1, **options}))


def what_is_in(shards: OpenShards) -> dict[str, Any]:
    """Everything that readers see of one or several sets."""

    # The reason of a line may name a position, which the columns beside it tell too.
    def plain(line: Any) -> Any:
        return dataclasses.replace(line, reason="") if line.reason.startswith("listed") else line

    rejects = [
        (x.reason if x.repeats is None else "", *map(x.__getattribute__, LINE))
        for x in shards.rejects
    ]
    found: dict[str, Any] = {"speakers": shards.speakers, "rejects": rejects}
    for name, split in shards.items():
        columns = (split.keys, split.labels, split.frames)
        matrices = [split.read(index).tobytes() for index in range(len(split))]
        found[name] = [*zip(*(column.tolist() for column in columns), matrices, strict=True)]
    found["entries"] = list(map(plain, shards.test_entries))
    return found


def stat_of(shards: Path, names: Iterable[str]) -> dict[str, tuple[Any, ...]]:
    found = {}
    for name in names:
        stat = (shards / name).stat()
        found[name] = (stat.st_mtime_ns, stat.st_ino, (shards / name).read_bytes())
    return found


def tars_of(shards: Path) -> list[str]:
    return sorted(path.name for path in shards.glob("*.tar"))


def matrices_of_tars(shards: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Label and matrix of each key, read as anyone reads a tar."""
    found = {}
    for name in tars_of(shards):
        with tarfile.open(shards / name) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name in members:
            if name.endswith(".mel.npy"):
                key = name.removesuffix(".mel.npy")
                matrix = np.load(io.BytesIO(members[name]))
                found[key] = (members[f"{key}.cls"].decode(), matrix)
    return found


FILES = st.tuples(
    st.sampled_from(["ann", "bob", "cleo", "dan", None, None]),
    st.integers(1, 3),
    st.sampled_from(["", "", "", "", "garbage", "missing"]),
)


@st.composite
def two_sources(draw: st.DrawFn) -> tuple[list[File], list[File], random.Random]:
    """Files of a first source, new files, and an order."""
    first, new = draw(st.lists(FILES, max_size=9)), draw(st.lists(FILES, max_size=9))
    whole = [("ann", 2, "")]
    return (
        [File(f"a{n:05d}", *drawn) for n, drawn in enumerate([*whole, *first])],
        [File(f"b{n:05d}", *drawn) for n, drawn in enumerate([*whole, *new])],
        random.Random(draw(st.integers(0, 99))),
    )


def write_files(root: Path, files: list[File], rng: random.Random | None = None) -> Path:
    """A data set of these files; some test files are listed again, and the order is mixed."""
    labelled = [file for file in files if file.speaker is not None]
    test = [file for file in files if file.speaker is None]
    test += [file for file in test if int(file.name[1:]) % 3 == 0]
    if rng is not None:
        rng.shuffle(labelled)
        rng.shuffle(test)
    return write(root, labelled, test)


def listed_in(source: Path) -> Iterator[list[str]]:
    """The names that metadata.json lists, and those that testdata.json lists."""
    speakers = json.loads((source / "metadata.json").read_text())["speakers"]
    test = json.loads((source / "testdata.json").read_text())["utterances"]
    for entries in ([entry for own in speakers.values() for entry in own], test):
        yield [entry["feature_path"].removesuffix(".pt") for entry in entries]


def own_of(files: list[File], names: list[str]) -> list[File]:
    """The files of these names, in the order of the names."""
    by_name = {file.name: file for file in files}
    return [by_name[name] for name in names if name in by_name]


@settings(max_examples=20)
@given(two_sources(), st.booleans(), st.sampled_from(["none", "zstd"]))
def test_an_append_equals_the_set_and_a_build_of_the_new_files_opened_together(
    files: tuple[list[File], list[File], random.Random], superset: bool, codec: Any
) -> None:
    first, new, rng = files
    options = {**OPTIONS, "codec": codec, "on_error": "skip"}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_files(root / "A", first)
        write_files(root / "all", [*first, *new] if superset else new, rng)
        alone = write(root / "alone", *(own_of(new, name) for name in listed_in(root / "all")))
        for name in ("shards", "before"):
            build_shards(root / "A", root / name, BuildOptions(**options))
        build_shards(alone, root / "added", BuildOptions(**options))
        old = stat_of(root / "shards", tars_of(root / "shards"))
        report = append(root / "all", root / "shards")
        assert stat_of(root / "shards", old) == old
        together = open_shards([root / "before", root / "added"])
        assert what_is_in(open_shards(root / "shards")) == what_is_in(together)
        assert {name: len(split) for name, split in together.items()} == {
            name: split.samples for name, split in report.splits.items()
        }
        assert verify_shards(root / "shards", deep=True).intact
        again = append(root / "all", root / "shards")
        assert again.up_to_date
        assert not any((again.added, again.rejects, again.repeats, again.new_speakers))


@pytest.fixture
def first() -> list[File]:
    labelled = [File(f"a{n:05d}", "bob" if n % 3 else "ann", 5 + n) for n in range(8)]
    return [*labelled, *(File(f"t{n:05d}", None, 3) for n in range(3))]


@pytest.fixture
def new() -> list[File]:
    labelled = [File(f"b{n:05d}", ["zoe", "ann", "carl"][n % 3], 5 + n) for n in range(7)]
    return [*labelled, *(File(f"u{n:05d}", None, 3) for n in range(3))]


@pytest.fixture
def shards(first: list[File], tmp_path: Path) -> Path:
    """A set of the first files, whose source is tmp_path/A."""
    build_shards(write_files(tmp_path / "A", first), tmp_path / "shards", BuildOptions(**OPTIONS))
    return tmp_path / "shards"


def test_new_shards_are_those_of_a_build_of_them_but_for_labels_and_numbers(
    shards: Path, new: list[File], first: list[File], tmp_path: Path
) -> None:
    before = matrices_of_tars(shards)
    old = tars_of(shards)
    source = write_files(tmp_path / "B", new)
    report = append(source, shards)
    build_shards(source, tmp_path / "alone", BuildOptions(**OPTIONS))
    alone = matrices_of_tars(tmp_path / "alone")
    found = matrices_of_tars(shards)
    assert found.keys() == before.keys() | alone.keys()
    speakers = ["ann", "bob", "carl", "zoe"]
    assert list(open_shards(shards).speakers) == speakers
    wanted = {f.name: f for f in (*first, *new)}
    for key, (label, matrix) in found.items():
        speaker = wanted[key].speaker
        assert label == str(-1 if speaker is None else speakers.index(speaker))
        assert np.array_equal(matrix, mel_of(wanted[key]).astype(np.float16))
    # Files without a new label have the same bytes, under the next numbers.
    added = [name for name in tars_of(shards) if name not in old]
    assert len(added) == len(tars_of(tmp_path / "alone"))
    assert added == [
        f"{name}-{sum(o.startswith(name) for o in old) + number:06d}.tar"
        for name in ("test", "train", "val")
        for number in range(sum(o.startswith(name) for o in tars_of(tmp_path / "alone")))
    ]
    assert (shards / "test-000002.tar").read_bytes() == (
        tmp_path / "alone" / "test-000000.tar"
    ).read_bytes()
    assert report.new_speakers == 2
    assert sum(split.samples for split in report.added.values()) == len(new)
    assert (report.present, report.utterances_read) == (0, len(new))


def test_an_extended_source_adds_what_is_new_and_reads_nothing_else(
    shards: Path, first: list[File], new: list[File], tmp_path: Path
) -> None:
    write_files(tmp_path / "more", [*new, *first])
    for path in (tmp_path / "A").glob("*.pt"):
        os.replace(path, tmp_path / "more" / path.name)
    # A rename changes the time of the inode: so the first append compares.
    assert append(tmp_path / "more", shards).utterances_read == len(first) + len(new)
    more = [*first, *new, File("c00000", "ann", 4)]
    for name in ("metadata.json", "testdata.json"):
        write_files(tmp_path / f"names-{name}", more)
        shutil.copy(tmp_path / f"names-{name}" / name, tmp_path / "more")
    torch.save(torch.zeros(4, MELS), tmp_path / "more" / "c00000.pt")
    report = append(tmp_path / "more", shards)
    assert (report.present, report.utterances_read) == (len(first) + len(new), 1)
    assert report.added["train"].samples == 1


def test_the_same_source_again_writes_nothing(
    shards: Path, new: list[File], tmp_path: Path, contents: Contents
) -> None:
    source = write_files(tmp_path / "B", new)
    append(source, shards)
    before = stat_of(shards, os.listdir(shards))
    for again in (source, tmp_path / "A"):
        report = append(again, shards)
        assert report.up_to_date
        assert report.utterances_read == 0
        assert stat_of(shards, os.listdir(shards)) == before


class Notes(ProgressListener):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize("change", ["matrix", "speaker", "frames", "split"])
@pytest.mark.parametrize("dry", [False, True])
def test_other_utterances_of_known_keys_are_refused_before_anything_is_written(
    shards: Path, first: list[File], new: list[File], tmp_path: Path, change: str, dry: bool
) -> None:
    file = first[1]
    other = {
        "matrix": file,
        "speaker": File(file.name, "zoe", file.frames),
        "frames": File(file.name, file.speaker, file.frames + 1),
        "split": File(file.name, None, file.frames),
    }[change]
    source = write_files(tmp_path / "B", [other, *new])
    if change == "matrix":
        torch.save(torch.zeros(file.frames, MELS), source / f"{file.name}.pt")
    before = stat_of(shards, os.listdir(shards))
    with pytest.raises(BuildError, match=rf"1 of 1 utterances .* such as {file.name}\.pt") as error:
        append(source, shards, dry_run=dry)
    assert error.value.exit_code == 5
    assert stat_of(shards, os.listdir(shards)) == before


def test_options_are_those_of_the_set_and_others_are_refused_by_name(
    first: list[File], new: list[File], tmp_path: Path
) -> None:
    own = {"workers": 1, "dtype": "float32", "codec": "zstd", "level": 5, "seed": 4}
    own |= {"samples_per_shard": 3, "val_fraction": 0.5}
    shards = tmp_path / "shards"
    build_shards(write_files(tmp_path / "A", first), shards, BuildOptions(**own))  # type: ignore[arg-type]
    source = write_files(tmp_path / "B", new)
    others: dict[str, Any] = {"level": 6, "seed": 1, "samples_per_shard": 7, "val_fraction": 0.2}
    for name, value in others.items():
        codec = {"codec": "zstd"} if name == "level" else {}
        with pytest.raises(BuildError, match=f"{name} {own[name]}, not {value}"):
            append(source, shards, **codec, **{name: value})
    with pytest.raises(BuildError, match="dtype float32, not float16"):
        append_shards(source, shards, BuildOptions(workers=1), given={"dtype"})
    append(source, shards, dtype="float32", seed=4)
    manifest = open_shards(shards).manifest
    assert (manifest.dtype, manifest.codec.level) == ("float32", 5)
    assert manifest.splits["train"].shards[-1].samples <= 3
    build_shards(source, tmp_path / "alone", BuildOptions(**own))  # type: ignore[arg-type]
    alone = open_shards(tmp_path / "alone")
    for name, split in alone.items():
        assert open_shards(shards)[name].keys.tolist()[-len(split) :] == split.keys.tolist()


def test_the_command_tells_what_is_new_and_refuses_options_that_were_given(
    shards: Path, new: list[File], tmp_path: Path, run_cli: Callable[..., Any]
) -> None:
    source = write_files(tmp_path / "B", new)
    # The default of the command, and not the set's own.
    done = run_cli("build", source, shards, "--append", "--samples-per-shard", 1000)
    assert done.returncode == 5
    assert "samples_per_shard 2, not 1000" in done.stderr
    done = run_cli("build", source, shards, "--append", "--level", 3)
    assert done.returncode == 5
    assert "codec none, not zstd" in done.stderr
    assert run_cli("build", source, shards, "--append", "--overwrite").returncode == 2
    done = run_cli("build", source, shards, "--append", "--dry-run", "--dtype", "float16")
    assert done.returncode == 0
    done = run_cli("build", source, shards, "--append", "--json")
    told = json.loads(done.stdout)
    assert sum(split["samples"] for split in told["added"].values()) == len(new)
    assert (told["new_speakers"], told["up_to_date"]) == (2, False)
    done = run_cli("build", source, shards, "--append")
    assert "up to date, nothing to do\nadded: no utterance; 0 new speakers\n" in done.stdout
    assert f"in the set before: {len(new)} utterances of SRC" in done.stdout


def test_a_set_that_no_build_made_is_refused(
    shards: Path, new: list[File], tmp_path: Path, altered: Callable[..., None]
) -> None:
    altered(shards, build=None, source_fingerprint=None)
    with pytest.raises(BuildError, match="options that this set was made with are not known"):
        append(write_files(tmp_path / "B", new), shards)


@pytest.mark.parametrize("field", ["n_mels", "features"])
def test_other_features_are_refused(
    shards: Path, new: list[File], tmp_path: Path, altered: Callable[..., None], field: str
) -> None:
    source = write_files(tmp_path / "B", new)
    if field == "n_mels":
        for name in ("metadata.json", "testdata.json"):
            text = (source / name).read_text()
            (source / name).write_text(text.replace(f'"n_mels": {MELS}', '"n_mels": 9'))
    else:
        altered(shards, features={"hop": 160})
    with pytest.raises(BuildError, match=f"{field}: the set has {field}"):
        append(source, shards)


@pytest.fixture
def altered() -> Callable[..., None]:
    """`altered(folder, **fields)`: give the manifest other fields."""
    import msgspec

    from shardprep.format.manifest import encode_manifest

    def alter(folder: Path, **fields: Any) -> None:
        manifest = msgspec.structs.replace(open_shards(folder).manifest, **fields)
        (folder / "manifest.json").write_bytes(encode_manifest(manifest))

    return alter


def test_a_labelled_file_that_was_left_out_and_is_right_now_is_added(
    first: list[File], new: list[File], tmp_path: Path
) -> None:
    faulty = [File("f00000", "ann", 5, "garbage"), File("f00001", "ann", 5, "missing")]
    faulty += [File("g00000", None, 5, "garbage")]
    files = [*first, *faulty]
    source, shards = write_files(tmp_path / "A", files), tmp_path / "shards"
    build_shards(source, shards, BuildOptions(**OPTIONS, on_error="skip"))
    entries = open_shards(shards).test_entries
    for file in faulty:
        torch.save(torch.from_numpy(mel_of(file)), source / f"{file.name}.pt")
    report = append(source, shards)
    assert sum(split.samples for split in report.added.values()) == 2
    assert "1 test entries that the set has left out are undamaged now" in report.notes[0]
    found = open_shards(shards)
    assert {line.key for line in found.rejects if line.repeats is None} == {"g00000"}
    assert found.test_entries == entries
    assert append(source, shards).up_to_date


def test_faulty_files_stop_an_append_unless_the_set_or_the_caller_skips_them(
    shards: Path, new: list[File], tmp_path: Path
) -> None:
    source = write_files(tmp_path / "B", [*new, File("f00000", "ann", 5, "garbage")])
    before = stat_of(shards, os.listdir(shards))
    with pytest.raises(SourceError, match=r"f00000\.pt"):
        append(source, shards)
    assert stat_of(shards, before) == before
    checked = append(source, shards, dry_run=True)
    assert checked.stops
    assert [line.key for line in checked.rejects] == ["f00000"]
    report = append(source, shards, on_error="skip")
    assert [line.key for line in report.rejects] == ["f00000"]
    # The set says now that something was skipped, and goes on so.
    more = write_files(tmp_path / "C", [File("h00000", "ann", 5, "garbage"), *new])
    assert [line.key for line in append(more, shards).rejects] == ["h00000"]
    last = write_files(tmp_path / "D", [File("i00000", "ann", 5, "missing"), *new])
    with pytest.raises(SourceError, match=r"i00000\.pt"):
        append_shards(last, shards, BuildOptions(workers=1), given={"on_error"})


def test_a_place_without_a_set_is_refused_and_stays_as_it_is(
    new: list[File], tmp_path: Path
) -> None:
    source = write_files(tmp_path / "B", new)
    for place in (tmp_path / "nothing", source):
        before = sorted(place.iterdir()) if place.exists() else None
        with pytest.raises(FormatError):
            append(source, place)
        assert (sorted(place.iterdir()) if place.exists() else None) == before


def test_a_damaged_set_is_refused(shards: Path, new: list[File], tmp_path: Path) -> None:
    source = write_files(tmp_path / "B", new)
    (index,) = shards.glob("*train.index.npy")
    data = index.read_bytes()
    index.write_bytes(data[:-1] + b"x")
    with pytest.raises(CorruptShardError, match=r"train\.index\.npy"):
        append(source, shards)
    index.write_bytes(data)
    (shards / "train-000000.tar").unlink()
    with pytest.raises(BuildError, match=r"train-000000\.tar .* is missing") as caught:
        append(source, shards)
    # To overwrite the set would leave only what is new.
    assert caught.value.remedy == "First restore it with `shardprep repair`."


def test_a_build_into_an_appended_set_is_refused_with_the_remedy(
    shards: Path, new: list[File], tmp_path: Path
) -> None:
    source = write_files(tmp_path / "B", new)
    append(source, shards)
    for one in (source, tmp_path / "A"):
        with pytest.raises(BuildError, match=r"built from another source\. .*--append"):
            build_shards(one, shards, BuildOptions(**OPTIONS))


def test_an_appended_set_is_compared_with_all_that_it_was_made_of(
    shards: Path, new: list[File], first: list[File], tmp_path: Path
) -> None:
    one, two = tmp_path / "A", write_files(tmp_path / "B", new)
    old = tars_of(shards)
    append(two, shards)
    assert verify_shards(shards, against=[one, two]).intact
    faults = verify_shards(shards, against=one).faults
    assert [fault.file for fault in faults] == [n for n in sorted_by_split(shards) if n not in old]
    assert {fault.key for fault in faults} <= {file.name for file in new}
    assert "(and 1 more of this shard)" in str(faults)
    torch.save(torch.zeros(new[0].frames, MELS), two / f"{new[0].name}.pt")
    (fault,) = verify_shards(shards, against=[one, two]).faults
    assert (fault.key, fault.what[:7]) == (new[0].name, "differs")


def sorted_by_split(shards: Path) -> list[str]:
    splits = open_shards(shards).manifest.splits.values()
    return [shard.file for split in splits for shard in split.shards]


def test_an_appended_set_is_repaired_from_all_that_it_was_made_of(
    shards: Path, new: list[File], tmp_path: Path, contents: Contents
) -> None:
    one, two = tmp_path / "A", write_files(tmp_path / "B", new)
    append(two, shards)
    before = contents(shards)
    split = open_shards(shards)["train"]
    for row in (split.locations[0], split.locations[-1]):
        with (shards / f"train-{row['shard']:06d}.tar").open("r+b") as file:
            file.seek(int(row["offset"]) + 130)
            file.write(b"x")
    part = repair_shards(shards, source=two, workers=1)
    assert [fault.file for fault in part.faults] == ["train-000000.tar"]
    assert f"is not in the data set {two}" in part.notes[0]
    assert repair_shards(shards, source=[one, two], workers=1).intact
    assert contents(shards) == before


def test_open_readers_go_on_or_say_that_the_set_was_changed(
    shards: Path, new: list[File], tmp_path: Path
) -> None:
    opened = open_shards(shards)
    started, later = opened["train"], opened.manifest.splits["test"]
    before = [started.read(index).tobytes() for index in range(len(started))]
    append(write_files(tmp_path / "B", new), shards)
    assert [started.read(index).tobytes() for index in range(len(started))] == before
    assert later.samples == 3
    with pytest.raises(CorruptShardError, match="the set was changed while it was being read"):
        opened.check_unchanged()
    with pytest.raises(CorruptShardError):
        opened["test"].read(0)


def test_a_list_of_files_is_appended_like_a_data_set(
    shards: Path, first: list[File], tmp_path: Path
) -> None:
    lines = ["path,speaker,split"]
    added = [File(f"n{n:05d}", None if n == 4 else "zoe", 4 + n) for n in range(5)]
    for file in added:
        np.save(tmp_path / f"{file.name}.npy", mel_of(file))
        split = "test" if file.speaker is None else "val" if file.name.endswith("0") else ""
        lines.append(f"{file.name}.npy,{file.speaker or ''},{split}")
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    report = append(tmp_path / "list.csv", shards)
    assert {name: split.samples for name, split in report.added.items()}["test"] == 1
    found = open_shards(shards)
    assert [entry.file for entry in found.test_entries][-1].startswith("n00004")
    keys = {name: found[name].keys.tolist() for name in found}
    assert "n00000" in keys["val"]
    for file in added:
        split = next(found[name] for name in found if file.name in keys[name])
        row = split.keys.tolist().index(file.name)
        assert np.array_equal(split.read(row), mel_of(file).astype(np.float16))
    assert append(tmp_path / "list.csv", shards).up_to_date
    np.save(tmp_path / "n00001.npy", np.zeros((5, MELS), np.float32))
    with pytest.raises(BuildError, match="not those of the set"):
        append(tmp_path / "list.csv", shards)
