"""embed, compare and identify on recordings: what they print, write and refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click import Command
from click.testing import CliRunner, Result

import shardprep
from shardprep_trainer import SpeakerModel, compare, embed, identify
from shardprep_trainer.pretrained.recordings import Recording
from shardprep_trainer.pretrained.results import Match


def run_command(command: Command, *words: object) -> Result:
    return CliRunner().invoke(command, [*map(str, words)])


def test_compare_prints_cosine_probability_and_decision(run: Path, audio: Path) -> None:
    a, b = audio / "s0" / "3.wav", audio / "s2" / "2.wav"
    expected = SpeakerModel.from_pretrained(run).compare(a, b, prior=0.01)
    result = run_command(compare.main, run, a, b, "--prior", 0.01)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        f"cosine: {expected.cosine:.4f}",
        f"probability that the speaker is the same: {expected.probability:.4f} (prior 0.01)",
        f"same speaker: {'yes' if expected.same else 'no'} (threshold 0.2500)",
    ]
    row = json.loads(run_command(compare.main, run, a, b, "--prior", 0.01, "--json").stdout)
    assert row == {
        "a": str(a),
        "b": str(b),
        "cosine": pytest.approx(expected.cosine, abs=1e-6),
        "probability": pytest.approx(expected.probability, abs=1e-6),
        "same": expected.same,
        "prior": 0.01,
        "threshold": 0.25,
    }


def test_compare_says_what_a_model_without_trials_lacks(
    make_run: Callable[..., Path], audio: Path
) -> None:
    run = make_run(thresholds=None, calibration=None)
    result = run_command(compare.main, run, audio / "s0" / "3.wav", audio / "s2" / "2.wav")
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 1
    assert "note: the model has no threshold and no calibration" in result.stderr


def test_identify_prints_the_best_speakers_of_each_recording(run: Path, audio: Path) -> None:
    paths = [audio / "s0" / "3.wav", audio / "s1" / "4.flac"]
    expected = SpeakerModel.from_pretrained(run).identify(paths, top=2)
    result = run_command(identify.main, run, *paths, "--top", 2, "--json")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["path"] for row in rows] == [str(path) for path in paths]
    for row, matches in zip(rows, expected, strict=True):
        assert [speaker["speaker"] for speaker in row["speakers"]] == [m.speaker for m in matches]
        assert row["speakers"][0]["score"] == pytest.approx(matches[0].score, abs=1e-5)
    # The second is longer than the model takes at a time.
    assert f"note: {paths[1]}: " in result.stderr
    assert "embedded in 3 pieces" in result.stderr
    lines = run_command(identify.main, run, paths[0], "--top", 1).stdout.splitlines()
    assert lines == [str(paths[0]), f"  {expected[0][0].speaker}  {expected[0][0].score:8.4f}"]


def test_names_of_speakers_do_not_move_the_cursor() -> None:
    matches = [Match("a\x1b[2J\nb", 0.5), Match("Zoë", 0.25)]
    lines = identify._lines(Recording(Path("x.wav"), "x"), matches)
    assert lines.split("\n") == [
        "x.wav",
        "  a\\x1b[2J\\nb    0.5000",
        "  Zoë            0.2500",
    ]


def test_embed_writes_parquet_with_a_row_a_recording(
    run: Path, audio: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.parquet"
    result = run_command(embed.main, run, audio / "s0", "--out", out)
    assert result.exit_code == 0, result.output
    table = pq.read_table(out)
    assert table.column("key").to_pylist() == ["0", "3"]
    assert table.column("path").to_pylist() == [str(audio / "s0" / f"{n}.wav") for n in (0, 3)]
    assert table.schema.metadata[b"step"] == b"5"
    expected = SpeakerModel.from_pretrained(run).embed_audio(audio / "s0" / "3.wav")
    assert np.allclose(table.column("embedding").to_pylist()[1], expected, atol=1e-5)


def test_embed_writes_parquet_of_a_split(run: Path, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.parquet"
    result = run_command(embed.main, run, "--split", "train", "--out", out)
    assert result.exit_code == 0, result.output
    table, split = pq.read_table(out), shardprep.open_shards(shards)["train"]
    assert table.column("key").to_pylist() == split.keys.tolist()
    speakers = shardprep.open_shards(shards).speakers
    assert table.column("speaker").to_pylist() == [speakers[label] for label in split.labels]


def test_a_faulty_recording_ends_the_command_or_is_left_out(
    run: Path, audio: Path, tmp_path: Path
) -> None:
    faulty, out = audio / "s0" / "1.wav", tmp_path / "x.npz"
    faulty.write_bytes(b"RIFF")
    result = run_command(embed.main, run, audio, "--out", out)
    assert result.exit_code == 1
    assert f"error: {faulty}: is " in result.stderr
    assert "--on-error skip" in result.stderr
    assert not out.exists()
    result = run_command(embed.main, run, audio, "--out", out, "--on-error", "skip")
    assert result.exit_code == 0, result.output
    assert f"warning: {faulty}: is " in result.stderr
    assert "1 of 7 recordings are left out" in result.stderr
    with np.load(out) as file:
        assert len(file["keys"]) == 6
        assert str(faulty) not in file["paths"]
    result = run_command(identify.main, run, faulty, "--on-error", "skip")
    assert result.exit_code == 1
    assert "none of the 1 recordings can be used" in result.stderr


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["a.wav", "--split", "val"], 2, "--split is for shards"),
        (["a.wav", "--max-frames", "9"], 2, "--max-frames is for shards"),
        (["--on-error", "skip"], 2, "--on-error is for recordings"),
        (["nowhere.wav"], 1, "nowhere.wav: there is no such recording"),
        (["nowhere.csv"], 1, "nowhere.csv: there is no such list"),
    ],
)
def test_what_cannot_be_done_has_one_message_and_its_code(
    run: Path, tmp_path: Path, words: list[str], code: int, part: str
) -> None:
    result = run_command(embed.main, run, *words, "--out", tmp_path / "x.npz")
    assert result.exit_code == code
    assert part in result.stderr


def test_a_model_of_unknown_features_takes_those_of_a_set(
    make_run: Callable[..., Path], audio: Path, shards: Path
) -> None:
    run, path = make_run(features=None), audio / "s0" / "3.wav"
    result = run_command(identify.main, run, path)
    assert result.exit_code == shardprep.FormatError.exit_code
    assert "--features-from" in result.stderr
    assert run_command(identify.main, run, path, "--features-from", shards).exit_code == 0
    assert run_command(identify.main, run, path, "--features-from", "homework").exit_code == 0
