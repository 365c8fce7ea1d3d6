"""A complete situation is held out; no recording of it remains in the training data."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from scripts.ladder import hold_out
from shardprep.errors import SourceError

SITUATIONS = 3


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """5 speakers, each in 3 situations of 4 utterances, which their names tell; bins of 8."""
    random = np.random.default_rng(0)
    folder = tmp_path / "Dataset"
    folder.mkdir()
    speakers: dict[str, list[dict[str, object]]] = {}
    for speaker in range(5):
        voice = random.normal(size=8)
        for situation in range(SITUATIONS):
            channel = 2 * random.normal(size=8)
            for take in range(4):
                frames = int(random.integers(60, 90))
                mel = voice + channel + random.normal(size=(frames, 8))
                name = f"uttr-{speaker}{situation}{take}.pt"
                torch.save(torch.from_numpy(mel.astype(np.float32)), folder / name)
                entry = {"feature_path": name, "mel_len": frames}
                speakers.setdefault(f"id{speaker}", []).append(entry)
    metadata = {"n_mels": 8, "speakers": speakers}
    (folder / "metadata.json").write_text(json.dumps(metadata))
    numbers = {name: n for n, name in enumerate(speakers)}
    names = {str(n): name for name, n in numbers.items()}
    (folder / "mapping.json").write_text(json.dumps({"speaker2id": numbers, "id2speaker": names}))
    return folder


def change_entries(dataset: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Let `change` change what metadata.json says of every utterance."""
    path = dataset / "metadata.json"
    metadata = json.loads(path.read_text())
    for entries in metadata["speakers"].values():
        for entry in entries:
            change(entry)
    path.write_text(json.dumps(metadata))


def test_one_complete_situation_of_every_speaker_is_held_out(
    recorded: Path, tmp_path: Path
) -> None:
    target = tmp_path / "held-out"
    words = [str(recorded), str(target), "--situations", str(SITUATIONS)]
    done = CliRunner().invoke(hold_out.main, words)
    assert done.exit_code == 0, done.output
    assert "40 utterances to train on, 20 held out, 0 left out" in done.output
    with (target / "test_labels.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["Id", "Category"]
    metadata = json.loads((target / "Dataset" / "metadata.json").read_text())
    test = json.loads((target / "Dataset" / "testdata.json").read_text())
    assert [entry["feature_path"] for entry in test["utterances"]] == [name for name, _ in rows]
    for speaker, entries in metadata["speakers"].items():
        trained = {entry["feature_path"][6] for entry in entries}
        held = {name[6] for name, owner in rows if owner == speaker}
        assert len(held) == 1
        assert len(trained) == SITUATIONS - 1
        assert not held & trained
        assert all(name[5] == speaker[2] for name, owner in rows if owner == speaker)
    for name in [name for name, _ in rows] + [entries[0]["feature_path"]]:
        assert (target / "Dataset" / name).read_bytes() == (recorded / name).read_bytes()


def test_what_shares_a_recording_with_the_held_out_is_not_trained_on(
    recorded: Path, tmp_path: Path
) -> None:
    # One take of every speaker is part of an utterance in each situation, after other words.
    take = np.random.default_rng(1).normal(size=(100, 8))
    for speaker in range(5):
        for situation in range(SITUATIONS):
            name = recorded / f"uttr-{speaker}{situation}0.pt"
            mel = torch.load(name, weights_only=True).numpy()
            repeated = mel.mean(0) + np.concatenate([mel - mel.mean(0), take])
            torch.save(torch.from_numpy(repeated.astype(np.float32)), name)

    def measure(entry: dict[str, Any]) -> None:
        entry["mel_len"] = len(torch.load(recorded / entry["feature_path"], weights_only=True))

    change_entries(recorded, measure)
    target = tmp_path / "held-out"
    words = [str(recorded), str(target), "--situations", str(SITUATIONS)]
    done = CliRunner().invoke(hold_out.main, words)
    assert "30 utterances to train on, 20 held out, 10 left out" in done.output
    metadata = json.loads((target / "Dataset" / "metadata.json").read_text())
    for speaker, entries in metadata["speakers"].items():
        names = [entry["feature_path"] for entry in entries]
        assert len(names) == 6, speaker
        assert not [name for name in names if name.endswith("0.pt")]
    held = json.loads((target / "Dataset" / "testdata.json").read_text())["utterances"]
    files = {path.name for path in (target / "Dataset").glob("uttr-*")}
    kept = [entry for entries in metadata["speakers"].values() for entry in entries]
    assert files == {entry["feature_path"] for entry in [*kept, *held]}


def test_nothing_of_a_speaker_of_one_take_is_held_out(recorded: Path) -> None:
    take = np.random.default_rng(1).normal(size=(120, 8)).astype(np.float32)
    names = [f"uttr-0{situation}{number}.pt" for situation in range(3) for number in range(4)]
    for number, name in enumerate(names):
        torch.save(torch.from_numpy(take + number // 4), recorded / name)

    def lengthen(entry: dict[str, Any]) -> None:
        if entry["feature_path"] in names:
            entry["mel_len"] = 120

    change_entries(recorded, lengthen)
    _, speakers = hold_out.divide(recorded, SITUATIONS)
    assert [one.path for one in speakers["id0"].kept] == names
    assert not speakers["id0"].held + speakers["id0"].left_out


def test_utterances_are_compared_in_their_most_similar_pieces_at_any_level() -> None:
    random = np.random.default_rng(2)
    mel, other = random.normal(size=(2, 250, 8)).astype(np.float32)
    repeated = np.concatenate([other, 3 + 2 * mel[30:160]])
    assert hold_out.correlation(mel, mel) == pytest.approx(1.0, abs=1e-5)
    assert hold_out.correlation(mel, repeated) == pytest.approx(1.0, abs=0.01)
    assert 0 < hold_out.correlation(mel, other) < 0.3
    assert hold_out.correlation(mel[:70], mel) == pytest.approx(1.0, abs=1e-5)
    for cut in (mel[30:155], mel[37:137], mel[43:103], mel[249:]):
        for pair in ((mel, cut), (cut, mel)):
            assert hold_out.correlation(*pair) == pytest.approx(float(len(cut) > 1), abs=1e-5)
    assert hold_out.correlation(np.zeros_like(mel), mel) == 0.0


def test_files_in_folders_and_links_to_files_are_linked(recorded: Path, tmp_path: Path) -> None:
    (recorded / "some").mkdir()
    (recorded / "store").mkdir()

    def link(entry: dict[str, Any]) -> None:
        name = entry["feature_path"]
        (recorded / name).rename(recorded / "store" / name)
        entry["feature_path"] = f"some/{name}"
        (recorded / "some" / name).symlink_to(Path("../store") / name)

    change_entries(recorded, link)
    target = tmp_path / "far" / "away" / "held-out"
    done = CliRunner().invoke(hold_out.main, [str(recorded), str(target)])
    assert done.exit_code == 0, done.output
    placed = list((target / "Dataset" / "some").iterdir())
    assert len(placed) == 60
    for file in placed:
        assert file.read_bytes() == (recorded / "store" / file.name).read_bytes()


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("../elsewhere.pt", r"\.\./elsewhere\.pt: speaker id0: the path leads outside"),
        ("uttr-001.pt", "uttr-001.pt: speaker id0: .*lists it again"),
        ("uttr-missing.pt", "uttr-missing.pt: speaker id0: the file does not exist"),
    ],
)
def test_a_data_set_that_could_not_be_built_is_refused_by_file(
    recorded: Path, tmp_path: Path, path: str, reason: str
) -> None:

    def mislead(entry: dict[str, Any]) -> None:
        if entry["feature_path"] == "uttr-000.pt":
            entry["feature_path"] = path

    change_entries(recorded, mislead)
    done = CliRunner().invoke(hold_out.main, [str(recorded), str(tmp_path / "new")])
    assert re.search(reason, done.output), done.output
    assert (done.exit_code, (tmp_path / "new").exists()) == (SourceError.exit_code, False)


def test_the_group_farthest_from_the_others_is_chosen_and_never_most() -> None:
    line = np.array([0.0, 0.1, 0.2, 5.0, 5.1, 7.0, 7.1])[:, None]
    found = hold_out.choose_group(line, 3)
    assert found.tolist() == [True, True, True, False, False, False, False]
    most = np.array([0.0, 0.1, 0.2, 0.3, 50.0])[:, None]
    assert hold_out.choose_group(most, 2).tolist() == [False] * 4 + [True]
    assert not hold_out.choose_group(line[:1], 3).any()


def test_an_existing_folder_is_not_changed(recorded: Path, tmp_path: Path) -> None:
    (tmp_path / "Dataset2" / "Dataset").mkdir(parents=True)
    done = CliRunner().invoke(hold_out.main, [str(recorded), str(tmp_path / "Dataset2")])
    assert done.exit_code == 2
    assert "is there already" in done.output
    done = CliRunner().invoke(hold_out.main, [str(tmp_path), str(tmp_path / "new")])
    assert done.exit_code == 2
    assert "metadata.json" in done.output
    (recorded / "mapping.json").unlink()
    done = CliRunner().invoke(hold_out.main, [str(recorded), str(tmp_path / "new")])
    assert (done.exit_code, (tmp_path / "new").exists()) == (2, False)
    assert "mapping.json" in done.output
