"""Recordings are packed as the features of their recipe, wherever they lie and however listed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from click.testing import CliRunner

from shardprep import (
    BuildError,
    BuildOptions,
    BuildReport,
    FeatureRecipe,
    FormatError,
    SourceError,
    append_shards,
    audio_features,
    open_shards,
    repair_shards,
    verify_shards,
)
from shardprep.build.homework import write_features
from shardprep.build.known_features import recipe_at
from shardprep.cli import cli
from shardprep.source.recordings.folders import recordings_in
from shardprep.source.recordings.names import Piece, key_of_recording, piece_of
from shardprep.source.scan import scan_source
from tests.shardprep.audio.oracle import speech, wav

NARROW = FeatureRecipe(n_mels=8, f_max=4000.0)
Files = dict[str, bytes]
Contents = Callable[[Path], dict[str, str]]
Build = Callable[..., BuildReport]


@pytest.fixture(scope="session")
def voices() -> Files:
    """Short recordings by name: three of each of four speakers, in folders of any depth."""
    found = {}
    for number in range(12):
        speaker = "abcd"[number % 4]
        folder = ("", "video1/", "book/chapter 2/")[number // 4]
        found[f"{speaker}/{folder}{number:05d}.wav"] = wav(speech(0.3 + 0.02 * number, number))
    return found


@pytest.fixture
def audio(tmp_path: Path, voices: Files) -> Path:
    return write(tmp_path / "audio", voices)


def write(root: Path, files: Files) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def found_in(shards: Path) -> dict[str, tuple[str, str, Any]]:
    """Split, speaker and matrix of every utterance, by key."""
    opened = open_shards(shards)
    names = (*opened.speakers, "")
    return {
        key: (name, names[split.labels[i]], split.read(i))
        for name, split in opened.items()
        for i, key in enumerate(split.keys.tolist())
    }


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_folders_of_speakers_are_packed_by_the_recipe(
    audio: Path, voices: Files, tmp_path: Path, build: Build, dtype: Any
) -> None:
    (audio / "README.txt").write_text("not a recording")
    (audio / "a" / "._00000.wav").write_bytes(b"what a Mac leaves")
    build(audio, tmp_path / "s", recipe=NARROW, dtype=dtype)
    manifest = open_shards(tmp_path / "s").manifest
    assert (manifest.n_mels, manifest.features) == (8, NARROW.to_features())
    assert verify_shards(tmp_path / "s", against=audio).intact
    found = found_in(tmp_path / "s")
    assert found.keys() == {name.removesuffix(".wav") for name in voices}
    for name, data in voices.items():
        _, speaker, mel = found[name.removesuffix(".wav")]
        assert speaker == name[0]
        np.testing.assert_array_equal(mel, audio_features(data, NARROW, dtype=dtype))


def test_any_number_of_workers_gives_the_same_bytes_and_the_set_is_kept_up_to_date(
    audio: Path, tmp_path: Path, build: Build, contents: Contents
) -> None:
    for workers in (1, 2):
        build(audio, tmp_path / f"s{workers}", workers=workers, samples_per_shard=3)
    assert contents(tmp_path / "s1") == contents(tmp_path / "s2")
    assert build(audio, tmp_path / "s1", samples_per_shard=3).up_to_date
    with pytest.raises(BuildError, match=r"other features \(f_max 8000.0, not 4000.0; n_mels 40"):
        build(audio, tmp_path / "s1", samples_per_shard=3, recipe=NARROW)


def test_a_set_is_verified_and_repaired_by_its_own_recipe(
    audio: Path, tmp_path: Path, build: Build, contents: Contents
) -> None:
    build(audio, tmp_path / "s", recipe=NARROW)
    assert verify_shards(tmp_path / "s", against=audio).intact
    before = contents(tmp_path / "s")
    shard = tmp_path / "s" / "train-000000.tar"
    data = bytearray(shard.read_bytes())
    data[800:1000] = bytes(200)
    shard.write_bytes(data)
    assert repair_shards(tmp_path / "s", source=audio).intact
    assert contents(tmp_path / "s") == before
    (audio / "a" / "00000.wav").write_bytes(wav(speech(0.4, 99)))
    (fault,) = verify_shards(tmp_path / "s", against=audio).faults
    assert fault.key == "a/00000"


def test_more_recordings_are_appended_with_the_features_of_the_set(
    audio: Path, voices: Files, tmp_path: Path, build: Build
) -> None:
    build(audio, tmp_path / "s", recipe=NARROW)
    more = write(tmp_path / "more", {f"e/{n}.wav": wav(speech(0.3, 50 + n)) for n in range(2)})
    report = append_shards(more, tmp_path / "s")
    assert (report.new_speakers, sum(s.samples for s in report.added.values())) == (1, 2)
    assert len(found_in(tmp_path / "s")) == len(voices) + 2
    for options, said in (
        (BuildOptions(recipe=FeatureRecipe(n_mels=8)), r"\(f_max 4000\.0, not 8000\.0\)\. Build"),
        (BuildOptions(n_mels=9), "n_mels: the set has n_mels 8, and .* has 9"),
    ):
        with pytest.raises(BuildError, match=said):
            append_shards(more, tmp_path / "s", options)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_list_names_recordings_and_pieces_of_them(
    audio: Path, voices: Files, tmp_path: Path, build: Build, suffix: str
) -> None:
    long = wav(speech(2, 7))
    (audio / "long.v2.wav").write_bytes(long)
    rows = [{"path": name, "speaker": name[0]} for name in voices]
    rows[0] |= {"split": "test"}
    rows[1] |= {"split": "val", "key": "own/name"}
    rows.append({"path": "long.v2.wav", "speaker": "z", "start": "0.25", "end": "1"})
    rows.append({"path": "long.v2.wav", "speaker": "y", "start": "1.5"})
    columns = ("path", "speaker", "split", "key", "start", "end")
    text = "\n".join(json.dumps(row) for row in rows)
    if suffix == ".csv":
        lines = [",".join(row.get(name, "") for name in columns) for row in rows]
        text = "\n".join([",".join(columns), *lines])
    (audio / f"list{suffix}").write_text(text)
    build(audio / f"list{suffix}", tmp_path / "s", recipe=NARROW)
    found = found_in(tmp_path / "s")
    assert found["a/00000"][:2] == ("test", "a")
    assert found["own/name"][:2] == ("val", "b")
    pieces: tuple[tuple[str, str, dict[str, float]], ...] = (
        ("long-v2-0_25-1", "z", {"start": 0.25, "end": 1.0}),
        ("long-v2-1_5", "y", {"start": 1.5}),
    )
    for key, speaker, times in pieces:
        assert found[key][1] == speaker
        expected = audio_features(long, NARROW, dtype="float16", **times)  # type: ignore[arg-type]
        np.testing.assert_array_equal(found[key][2], expected)


def test_kaldis_directory_of_recordings(
    audio: Path, voices: Files, tmp_path: Path, build: Build
) -> None:
    names = list(voices)[:4]
    long = wav(speech(2, 7))
    (audio / "long.wav").write_bytes(long)
    scp = [f"utt{n} {name}" for n, name in enumerate(names)]
    (audio / "wav.scp").write_text("\n".join([*scp, f"rec {audio}/long.wav"]))
    (audio / "utt2spk").write_text("\n".join(f"utt{n} {n % 2}" for n in range(6)))
    (audio / "segments").write_text(
        "utt0 utt0 0 0.3\nutt1 utt1 0 -1\nutt2 utt2 0 -1\nutt4 rec 0.5 1.25\nutt5 rec 1.25 -1\n"
    )
    build(audio, tmp_path / "s", recipe=NARROW)
    found = found_in(tmp_path / "s")
    assert found.keys() == {"utt0", "utt1", "utt2", "utt4", "utt5"}
    assert found["utt5"][1] == "1"
    expected = audio_features(long, NARROW, start=0.5, end=1.25, dtype="float16")
    np.testing.assert_array_equal(found["utt4"][2], expected)
    (audio / "segments").unlink()
    (audio / "utt2spk").write_text("\n".join(f"utt{n} {n % 2}" for n in range(4)) + "\nrec z\n")
    build(audio, tmp_path / "s2", recipe=NARROW)
    assert found_in(tmp_path / "s2").keys() == {"utt0", "utt1", "utt2", "utt3", "rec"}


def test_a_line_of_segments_has_four_values(audio: Path, tmp_path: Path, build: Build) -> None:
    (audio / "wav.scp").write_text("rec a/00000.wav\n")
    (audio / "utt2spk").write_text("u a\n")
    (audio / "segments").write_text("u rec 0 0.3 1\n")
    with pytest.raises(SourceError, match=r"segments: line 1 has 5 values, expected 4\. It has"):
        build(audio, tmp_path / "s")


def test_splits_may_be_folders(voices: Files, tmp_path: Path, build: Build) -> None:
    files = {}
    for number, (name, data) in enumerate(voices.items()):
        files[f"{('train', 'val', 'test')[number // 4]}/{name}"] = data
    build(write(tmp_path / "audio", files), tmp_path / "s", recipe=NARROW)
    for key, (split, speaker, _) in found_in(tmp_path / "s").items():
        assert key.split("/")[:2] == [split, speaker]


def test_recordings_of_a_store(
    audio: Path, tmp_path: Path, build: Build, contents: Contents, voices: Files
) -> None:
    build(audio, tmp_path / "here", recipe=NARROW)
    store = fsspec.filesystem("memory")
    for name, data in voices.items():
        store.pipe(f"/recordings/{name}", data)
    build("memory://recordings", tmp_path / "there", recipe=NARROW)
    here, there = contents(tmp_path / "here"), contents(tmp_path / "there")
    tars = [name for name in here if name.endswith(".tar")]
    assert [here[name] for name in tars] == [there[name] for name in tars]


FAULTS: dict[str, tuple[bytes, str]] = {
    "a/empty.wav": (b"", "is empty"),
    "a/silent.wav": (wav(np.zeros(9000)), "silent"),
    "a/short.wav": (wav(np.full(100, 0.1)), "too short"),
    "a/text.mp3": (b"hello there " * 20, "is no recording"),
    "a/half.wav": (wav(speech(1))[:9000], "is cut off"),
    "stray.wav": (wav(speech(1)), "lies in no folder of a speaker$"),
    # Of two files of one key, the second in order.
    "a/00000.wave.wav": (wav(speech(1)), "has the key of a/00000-wave.flac, a/00000-wave$"),
    "a/00000-wave.flac": (b"fLaC", "cannot be decoded|no recording|cut off"),
}


def test_faulty_recordings_are_named_or_left_out(
    audio: Path, voices: Files, tmp_path: Path, build: Build
) -> None:
    write(audio, {name: data for name, (data, _) in FAULTS.items()})
    with pytest.raises(SourceError, match="lies in no folder|has the key of"):
        build(audio, tmp_path / "s")
    report = build(audio, tmp_path / "s", on_error="skip", recipe=NARROW)
    reasons = {reject.file: reject.reason for reject in report.rejects}
    assert reasons.keys() == FAULTS.keys()
    for name, reason in reasons.items():
        assert re.search(FAULTS[name][1], reason), reason
    assert len(found_in(tmp_path / "s")) == len(voices)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("a/00000.wav,a,2,1", "end is 1, not after start, 2"),
        ("a/00000.wav,a,x,", "start is 'x', expected seconds"),
        ("a/00000.wav,a,-1,", "start is '-1', expected seconds"),
        ("a/00000.wav,a,0_0,", "start is '0_0', expected seconds"),
        ("a/00000.wav,a,500,501", "before the piece"),
        ("a/00000.wav,a,,1e308", "no time of a recording"),
        ("a/missing.wav,a,,", "does not exist"),
        ("a/00000.npy,a,,", "ends in none of"),
        ("../other.wav,a,,", "outside"),
        (",a,,", "the path is empty"),
    ],
)
def test_faulty_rows_are_named(
    audio: Path, tmp_path: Path, build: Build, row: str, said: str
) -> None:
    (audio / "list.csv").write_text(f"path,speaker,start,end\nb/00001.wav,b,,\n{row}\n")
    with pytest.raises(SourceError, match=said):
        build(audio / "list.csv", tmp_path / "s")


def test_kaldis_commands_are_not_executed(audio: Path, tmp_path: Path, build: Build) -> None:
    (audio / "wav.scp").write_text(f"u sox a/00000.wav -t wav - > {tmp_path}/made |\n")
    (audio / "utt2spk").write_text("u a\n")
    with pytest.raises(SourceError, match="commands are not executed"):
        build(audio, tmp_path / "s")
    assert not (tmp_path / "made").exists()


def test_links_out_of_the_folder_need_trust(
    audio: Path, voices: Files, tmp_path: Path, build: Build
) -> None:
    linked = tmp_path / "linked"
    for name in voices:
        (linked / name).parent.mkdir(parents=True, exist_ok=True)
        os.symlink(audio / name, linked / name)
    with pytest.raises(SourceError, match="--follow-links"):
        build(linked, tmp_path / "s")
    build(linked, tmp_path / "s", follow_links=True, recipe=NARROW)
    assert len(found_in(tmp_path / "s")) == len(voices)
    listed = tmp_path / "lists" / "list.csv"
    listed.parent.mkdir()
    lines = [f"{audio / name},{name[0]}" for name in voices]
    listed.write_text("\n".join(["path,speaker", *lines]))
    with pytest.raises(SourceError, match="outside"):
        build(listed, tmp_path / "s2")
    build(listed, tmp_path / "s2", follow_links=True, recipe=NARROW)
    assert len(found_in(tmp_path / "s2")) == len(voices)


def test_a_link_to_a_folder_above_is_not_followed_for_ever(audio: Path, voices: Files) -> None:
    os.symlink(audio, audio / "a" / "loop")
    os.symlink(audio / "b", audio / "a" / "b")
    found = recordings_in(audio, follow_links=True)
    assert found == sorted([*voices, *(f"a/{name}" for name in voices if name[0] == "b")])


def test_speakers_are_held_out_whole(voices: Files, tmp_path: Path, build: Build) -> None:
    files = {f"{n % 10}/{n}.wav": data for n, data in enumerate([*voices.values()] * 3)}
    audio = write(tmp_path / "audio", files)
    build(audio, tmp_path / "s", val_speakers=0.2, val_fraction=0.3, recipe=NARROW)
    splits: dict[str, set[str]] = {}
    for split, speaker, _ in found_in(tmp_path / "s").values():
        splits.setdefault(speaker, set()).add(split)
    held = {speaker for speaker, own in splits.items() if own == {"val"}}
    assert (len(splits), len(held)) == (10, 2)
    # More of theirs stays out of training, and so do some of new speakers.
    more = {f"{n % 10}/m{n}.wav": data for n, data in enumerate([*voices.values()] * 2)}
    more |= {f"new{n % 5}/{n}.wav": data for n, data in enumerate(voices.values())}
    append_shards(write(tmp_path / "more", more), tmp_path / "s")
    found = found_in(tmp_path / "s").values()
    trained = {speaker for split, speaker, _ in found if split == "train"}
    assert not trained & held
    assert trained >= splits.keys() - held
    assert len({f"new{n}" for n in range(5)} - trained) == 1


def test_features_write_the_homeworks_layout(
    audio: Path, voices: Files, tmp_path: Path, build: Build
) -> None:
    rows = [f"{name},{name[0]},{'test' if n > 9 else ''}" for n, name in enumerate(voices)]
    (audio / "list.csv").write_text("\n".join(["path,speaker,split", *rows]))
    report = write_features(audio / "list.csv", tmp_path / "Dataset", NARROW, workers=1)
    assert (report.utterances, report.speakers) == (12, 4)
    build(tmp_path / "Dataset", tmp_path / "s")
    build(audio / "list.csv", tmp_path / "direct", recipe=NARROW)
    assert open_shards(tmp_path / "s").manifest.features == NARROW.to_features()
    one, other = found_in(tmp_path / "s"), found_in(tmp_path / "direct")
    assert one.keys() == other.keys()
    for key in one:
        assert one[key][0] == other[key][0]
        np.testing.assert_array_equal(one[key][2], other[key][2])
    with pytest.raises(SourceError, match=r"metadata\.json: features: .* by another recipe"):
        build(tmp_path / "Dataset", tmp_path / "other", recipe=FeatureRecipe(n_mels=8))
    with pytest.raises(BuildError, match=r"has a metadata\.json already"):
        write_features(audio, tmp_path / "Dataset")
    with pytest.raises(SourceError, match="has features, and no recordings"):
        write_features(tmp_path / "Dataset", tmp_path / "other", NARROW)
    with pytest.raises(BuildError, match=r"has a manifest\.json already"):
        write_features(audio, tmp_path / "s")
    with pytest.raises(BuildError, match="is the folder of the recordings"):
        write_features(audio / "list.csv", audio)
    with pytest.raises(BuildError, match="is a URL"):
        write_features(audio, "memory://features")


def test_features_are_those_of_a_set_or_a_model(
    audio: Path, tmp_path: Path, build: Build, contents: Contents
) -> None:
    build(audio, tmp_path / "s", recipe=NARROW)
    model = tmp_path / "run" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps({"features": NARROW.to_features()}))
    for place in (tmp_path / "s", tmp_path / "run", model, model / "config.json"):
        assert recipe_at(place) == NARROW
    assert recipe_at("homework") == FeatureRecipe()
    words = ["build", str(audio), str(tmp_path / "again"), "--features-from", str(model)]
    CliRunner().invoke(cli, words, standalone_mode=False)
    assert contents(tmp_path / "again") == contents(tmp_path / "s")
    (model / "config.json").write_text(json.dumps({"features": None}))
    with pytest.raises(FormatError, match="nothing is known of how the features"):
        recipe_at(model)
    with pytest.raises(FormatError, match="neither"):
        recipe_at(audio)


def test_options_of_the_recipe_reach_the_manifest(audio: Path, tmp_path: Path) -> None:
    words = ["build", str(audio), str(tmp_path / "s"), "--n-mels", "8", "--f-max", "4000"]
    words += ["--peak-db", "none", "--norm", "slaney", "--hop-length", "200", "--workers", "1"]
    done = CliRunner().invoke(cli, words, standalone_mode=False)
    assert done.exception is None, done.output
    recipe = FeatureRecipe(n_mels=8, f_max=4000.0, peak_db=None, norm="slaney", hop_length=200)
    assert open_shards(tmp_path / "s").manifest.features == recipe.to_features()
    told = CliRunner().invoke(cli, ["inspect", str(tmp_path / "s"), "--json"]).stdout
    about = json.loads(told)
    assert about["features"] == recipe.to_features()
    # A frame is 12.5 ms.
    for split in about["splits"].values():
        assert split["hours"] == pytest.approx(split["frames"] * 0.0125 / 3600)
    shown = CliRunner().invoke(cli, ["inspect", str(tmp_path / "s")]).stdout
    assert "hop_length 200" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sample_rate", 10),
        ("f_max", 9000.0),
        ("f_min", 8000.0),
        ("win_length", 500),
        ("power", 3.0),
        ("n_mels", 0),
        ("n_mels", 1.5),
        ("log_floor", 0.0),
        ("mel_scale", "bark"),
        ("norm", "l2"),
        ("peak_db", 3.0),
        ("silence_level", 1.5),
        ("hop_length", True),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(name: str, value: Any) -> None:
    with pytest.raises(SourceError) as caught:
        FeatureRecipe(**{name: value})
    assert caught.value.key == name


def test_an_option_that_cannot_be_is_wrong_usage(audio: Path, tmp_path: Path) -> None:
    for command in ("build", "features"):
        words = [command, str(audio), str(tmp_path / "s"), "--f-max", "9000"]
        done = CliRunner().invoke(cli, words)
        assert done.exit_code == 2
        assert "'--f-max': is 9000.0, expected at most half of sample_rate" in done.output


def test_names_of_faulty_recordings_do_not_move_the_cursor(voices: Files, tmp_path: Path) -> None:
    (good,) = [data for name, data in voices.items() if name == "a/00000.wav"]
    write(tmp_path / "audio", {"a/0.wav": good, "a/x\x1b[2J\n\x9b1m.wav": b""})
    for words in (["build", "--dry-run"], ["features", "--on-error", "skip"]):
        at = [str(tmp_path / "audio"), str(tmp_path / "out"), "--workers", "1"]
        done = CliRunner().invoke(cli, [words[0], *at, *words[1:]])
        assert r"a/x\x1b[2J\n\x9b1m.wav: " in done.output
        assert not {"\x1b", "\x9b"} & {*done.output}


def test_a_recipe_survives_its_features() -> None:
    for recipe in (NARROW, FeatureRecipe(peak_db=None, norm="slaney", silence_level=None)):
        assert FeatureRecipe.from_features(json.loads(json.dumps(recipe.to_features()))) == recipe
    for features in (None, {}, {"n_fft": 512}, {**NARROW.to_features(), "version": 2}):
        with pytest.raises(FormatError):
            FeatureRecipe.from_features(features)


@pytest.mark.parametrize("times", [(None, None), (0.1, None), (None, 7.0), (1 / 3, 1e-7 + 1 / 3)])
def test_a_piece_survives_its_path(times: tuple[float | None, float | None]) -> None:
    piece = Piece("a b/c#t=1,2.wav", *times)
    found = piece_of(piece.path)
    assert (found.file, found.start or 0, found.end) == (piece.file, times[0] or 0, times[1])
    assert "." not in key_of_recording(*piece).rpartition("/")[2]


def test_pieces_of_a_recording_have_keys_of_their_own() -> None:
    times = [(1.5, 2.0), (1.0, 5.2), (15.0, 2e3), (None, 1.5), (1.5, None), (None, None)]
    keys = {key_of_recording("a/b.c.wav", *own) for own in times}
    assert len(keys) == len(times)
    assert {"a/b-c", "a/b-c-1_5-2", "a/b-c-1-5_2", "a/b-c-1_5"} <= keys


def test_a_folder_without_anything_says_what_is_expected(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(SourceError, match=r"metadata\.json"):
        scan_source(tmp_path)
