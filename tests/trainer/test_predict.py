"""Predictions: the split's own order, the checkpoint's own names, a complete file or none."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from oracle import model_of
from saved_models import BEST, change_best

import shardprep
from shardprep_trainer.checkpoint.files import load
from shardprep_trainer.checkpoint.open_shards import open_shards_of
from shardprep_trainer.config.fields import DataConfig, PredictConfig
from shardprep_trainer.errors import PredictionError
from shardprep_trainer.evaluation.wccn import Wccn
from shardprep_trainer.predict import main, score_submission, write_submission

# As the fixture `run` has them.
LAST = "checkpoints/step-00000009.pt"
NAMES = ["id00002", "id00000", "id00001"]


def predict(run: Path, *options: object) -> Result:
    return CliRunner().invoke(main, [str(run), *map(str, options)])


def expected_names(run: Path, shards: Path, split: str, checkpoint: str = BEST) -> list[str]:
    """The oracle: each utterance alone through the model of a checkpoint."""
    model = model_of(run / checkpoint)
    part = shardprep.open_shards(shards)[split]
    with torch.no_grad():
        scores = [model(torch.from_numpy(part.read(i)).float()[None]) for i in range(len(part))]
    return [NAMES[int(score.argmax())] for score in scores]


def test_rows_follow_testdata_json_and_carry_names(run: Path, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "submission.csv"
    result = predict(run, "--shards", shards, "--out", out, "--max-frames", 300)
    assert result.exit_code == 0, result.output
    lines = out.read_text().splitlines()
    listed = json.loads((tmp_path / "Dataset" / "testdata.json").read_text())["utterances"]
    assert lines[0] == "Id,Category"
    assert [line.split(",")[0] for line in lines[1:]] == [row["feature_path"] for row in listed]
    assert [line.split(",")[1] for line in lines[1:]] == expected_names(run, shards, "test")
    assert result.stdout == ""


def test_the_recipe_chooses_the_backend_and_an_option_overrides_it(
    run: Path, shards: Path, tmp_path: Path
) -> None:
    data, config = shardprep.open_shards(shards), load(run / BEST).config
    file = change_best(run, config=replace(config, predict=PredictConfig("wccn")))
    model = model_of(file)

    def embeddings(split: str) -> np.ndarray:
        mels = [torch.from_numpy(data[split].read(i)).float() for i in range(len(data[split]))]
        with torch.no_grad():
            return torch.cat([model.embed(mel[None]) for mel in mels]).numpy()

    scores = Wccn(embeddings("train"), data["train"].labels).scores(embeddings("val"))
    enrolled = [data.speakers[number] for number in scores.argmax(1)]
    by_head = expected_names(run, shards, "val")
    assert enrolled != by_head
    for options, names in (((), enrolled), (("--backend", "head"), by_head)):
        predict(run, "--split", "val", "--out", tmp_path / "out.csv", *options)
        rows = (tmp_path / "out.csv").read_text().splitlines()[1:]
        assert [row.split(",")[1] for row in rows] == names


def test_a_backend_without_speakers_to_know_is_an_error(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_speakers(data: DataConfig, paths: Sequence[str]) -> shardprep.OpenShards:
        shards = open_shards_of(data, paths)
        monkeypatch.setattr(shards["train"], "labels", np.full(len(shards["train"]), -1))
        return shards

    monkeypatch.setattr("shardprep_trainer.inference.open_shards_of", without_speakers)
    result = predict(run, "--backend", "wccn", "--out", tmp_path / "out.csv")
    assert result.exit_code == 1
    assert "has no train split with speakers" in result.stderr
    assert "--backend head" in result.stderr
    assert not (tmp_path / "out.csv").exists()


def test_the_shards_of_the_run_are_the_default(
    run: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert predict(run).exit_code == 0
    names = [line.split(",")[1] for line in Path("submission.csv").read_text().splitlines()[1:]]
    assert names == expected_names(run, shards, "test")


@pytest.mark.parametrize(
    ("checkpoint", "file"),
    [("best", BEST), ("last", LAST), (None, LAST), (None, BEST)],
)
def test_best_last_or_a_file_can_be_chosen(
    run: Path, shards: Path, tmp_path: Path, checkpoint: str | None, file: str
) -> None:
    choice = checkpoint or run / file
    out = tmp_path / "out.csv"
    result = predict(run, "--checkpoint", choice, "--split", "train", "--out", out)
    names = [line.split(",")[1] for line in out.read_text().splitlines()[1:]]
    assert names == expected_names(run, shards, "train", file)
    assert file in result.stderr


def test_accuracy_of_a_labelled_split_matches_labels_by_name(
    run: Path, shards: Path, tmp_path: Path
) -> None:
    result = predict(run, "--split", "val", "--out", tmp_path / "val.csv")
    data = shardprep.open_shards(shards)
    truths = [data.speakers[label] for label in data["val"].labels]
    names = expected_names(run, shards, "val")
    right = sum(a == b for a, b in zip(names, truths, strict=True))
    assert result.stdout == f"accuracy on val: {right / 6:.4f} ({right} of 6)\n"


def test_labels_that_cannot_be_read_are_named_before_the_long_work(
    run: Path, tmp_path: Path
) -> None:
    result = predict(run, "--out", tmp_path / "out.csv", "--labels", tmp_path / "nope.csv")
    assert result.exit_code == 1
    assert f"error: {tmp_path / 'nope.csv'}: cannot be read" in result.stderr
    assert not (tmp_path / "out.csv").exists()


def test_labels_score_the_file(run: Path, shards: Path, tmp_path: Path) -> None:
    truth = tmp_path / "test_labels.csv"
    result = predict(run, "--out", tmp_path / "out.csv", "--labels", truth)
    names = expected_names(run, shards, "test")
    rows = [line.split(",")[1] for line in truth.read_text().splitlines()[1:]]
    right = sum(a == b for a, b in zip(names, rows, strict=True))
    assert f"{right / 5:.4f} ({right} of 5)\n" in result.stdout


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.csv"
    write_submission(out, [("uttr-a.pt", "id1")])

    def fail(source: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(shardprep.StorageError, match=r"out\.csv: No space"):
        write_submission(out, [("uttr-b.pt", "id2")])
    assert out.read_text() == "Id,Category\nuttr-a.pt,id1\n"
    assert os.listdir(tmp_path) == ["out.csv"]


def test_shards_of_another_width_are_refused(run: Path, tmp_path: Path) -> None:
    change_best(run, n_mels=80)
    result = predict(run, "--out", tmp_path / "out.csv")
    assert result.exit_code == 1
    assert "has 40 mel bins a frame, but the model was trained on 80" in result.stderr
    assert not (tmp_path / "out.csv").exists()


def test_weights_that_do_not_fit_are_refused_by_file(run: Path, tmp_path: Path) -> None:
    file = change_best(run, speakers=tuple(NAMES[:2]))
    result = predict(run, "--out", tmp_path / "out.csv")
    assert result.exit_code == 1
    assert f"error: {file}: the weights in it do not fit" in result.stderr


def test_rows_that_the_build_left_out_are_told_and_no_other_split_suggested(
    run: Path, tmp_path: Path
) -> None:
    source, out = tmp_path / "Dataset", tmp_path / "out.csv"
    listed = json.loads((source / "testdata.json").read_text())["utterances"]
    lost = listed[2]["feature_path"]
    (source / lost).unlink()
    folder = tmp_path / "skipped"
    shardprep.build_shards(
        source, folder, shardprep.BuildOptions(val_fraction=0.2, workers=1, on_error="skip")
    )
    result = predict(run, "--shards", folder, "--out", out)
    assert result.exit_code == 0
    rows = [line.split(",")[0] for line in out.read_text().splitlines()[1:]]
    assert rows == [row["feature_path"] for row in listed if row["feature_path"] != lost]
    (note,) = [line for line in result.stderr.splitlines() if line.startswith("note: ")]
    assert "1 utterances" in note
    assert str(folder / "rejects.jsonl") in note
    (warning,) = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert "1 of 5 entries of testdata.json have no row" in warning
    assert f"such as {lost} (the file does not exist)" in warning
    assert "Kaggle refuses" in warning
    assert "--fill SPEAKER" in warning
    labels = tmp_path / "test_labels.csv"
    scored = predict(run, "--shards", folder, "--out", out, "--labels", labels)
    assert scored.exit_code == 1
    assert "1 of the 5 utterances" in scored.stderr
    assert "the build left them out" in scored.stderr
    assert "another split" not in scored.stderr
    wrong = predict(
        run, "--shards", folder, "--out", out, "--labels", labels, "--split", "val"
    ).stderr
    assert "was it made from another split? --split names one" in wrong
    assert "warning" not in wrong


def test_keys_that_sets_have_in_common_are_told(run: Path, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    again = tmp_path / "again"
    shardprep.build_shards(
        tmp_path / "Dataset", again, shardprep.BuildOptions(samples_per_shard=2, workers=1)
    )
    count = len(shardprep.open_shards(shards)["test"])
    result = predict(run, "--shards", shards, "--shards", again, "--out", out)
    assert result.exit_code == 0
    assert f"warning: {count} Ids occur again" in result.stderr
    assert "warning" not in predict(run, "--shards", shards, "--out", out).stderr


@pytest.fixture
def incomplete(tmp_path: Path, run: Path) -> tuple[Path, list[str]]:
    """Shards of a data set whose third and fourth test entries have no utterance, and whose sixth
    lists the second file again, the seventh the third; and the files of all seven."""
    source = tmp_path / "Dataset"
    testdata = json.loads((source / "testdata.json").read_text())
    listed = testdata["utterances"]
    listed += [listed[1], listed[2]]
    (source / "testdata.json").write_text(json.dumps(testdata))
    (source / listed[2]["feature_path"]).unlink()
    (source / listed[3]["feature_path"]).write_bytes(b"no tensor")
    options = shardprep.BuildOptions(val_fraction=0.2, workers=1, on_error="skip")
    shardprep.build_shards(source, tmp_path / "incomplete", options)
    return tmp_path / "incomplete", [entry["feature_path"] for entry in listed]


@pytest.mark.parametrize("fill", [None, "id00001", "commonest"])
def test_every_entry_gets_a_row_in_its_order_and_a_stand_in_if_asked_for(
    run: Path, incomplete: tuple[Path, list[str]], tmp_path: Path, fill: str | None
) -> None:
    folder, files = incomplete
    out = tmp_path / "out.csv"
    options = () if fill is None else ("--fill", fill)
    result = predict(run, "--shards", folder, "--out", out, *options)
    assert result.exit_code == 0, result.output
    a, b, e = expected_names(run, folder, "test")
    stand_in = max([a, b, e], key=[a, b, e].count) if fill == "commonest" else fill
    answers = [a, b, stand_in, stand_in, e, b, stand_in]
    expected = [f"{file},{name}" for file, name in zip(files, answers, strict=True) if name]
    assert out.read_text().splitlines() == ["Id,Category", *expected]
    (warning,) = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    what = "7 entries of testdata.json have no row" if fill is None else "7 rows have a stand-in"
    assert f"3 of {what}" in warning
    # The file can be scored: rows of one Id say the same.
    truth = write(tmp_path / "truth.csv", "Id,Category", f"{files[1]},{b}", f"{files[5]},{b}")
    assert score_submission(out, truth) == (1, 1)


def test_stand_ins_are_written_where_no_test_file_could_be_packed(
    run: Path, tmp_path: Path
) -> None:
    source, out = tmp_path / "Dataset", tmp_path / "out.csv"
    files = [
        entry["feature_path"]
        for entry in json.loads((source / "testdata.json").read_text())["utterances"]
    ]
    for file in files:
        (source / file).write_bytes(b"")
    options = shardprep.BuildOptions(val_fraction=0.2, workers=1, on_error="skip")
    folder = tmp_path / "untested"
    shardprep.build_shards(source, folder, options)
    for fill in ((), ("--fill", "commonest")):
        result = predict(run, "--shards", folder, "--out", out, *fill)
        assert result.exit_code == 1
        assert f"left out all {len(files)} entries of testdata.json" in result.stderr
        assert "--fill SPEAKER" in result.stderr
        assert not out.exists()
    result = predict(run, "--shards", folder, "--out", out, "--fill", "id00001")
    assert result.exit_code == 0, result.output
    assert out.read_text().splitlines() == ["Id,Category", *(f"{f},id00001" for f in files)]
    assert f"{len(files)} of {len(files)} rows have a stand-in" in result.stderr


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--fill", "nobody"], 1, "--fill nobody: the model knows no such speaker"),
        (["--fill", "id00001", "--split", "val"], 2, "--fill goes with --split test"),
    ],
)
def test_a_stand_in_that_makes_no_sense_is_refused_before_any_prediction(
    run: Path, tmp_path: Path, options: list[str], code: int, message: str
) -> None:
    result = predict(run, "--out", tmp_path / "out.csv", *options)
    assert result.exit_code == code
    assert message in result.stderr
    assert not (tmp_path / "out.csv").exists()


def test_too_little_memory_is_one_message(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("shardprep_trainer.predict.predict_names", exhausted)
    result = predict(run, "--out", tmp_path / "out.csv")
    assert result.exit_code == 1
    assert "--max-frames" in result.stderr


def test_segments_have_a_say_beside_the_whole(run: Path, shards: Path, tmp_path: Path) -> None:
    plain, none, some = (tmp_path / name for name in ("plain.csv", "none.csv", "some.csv"))
    chosen = ("--split", "train", "--shards", shards, "--max-frames", 500)
    assert predict(run, *chosen, "--out", plain).exit_code == 0
    assert predict(run, *chosen, "--out", none, "--tta", 0).exit_code == 0
    assert predict(run, *chosen, "--out", some, "--tta", 3, "--tta-frames", 30).exit_code == 0
    assert none.read_bytes() == plain.read_bytes()
    model = model_of(run / BEST)
    part, names = shardprep.open_shards(shards)["train"], []
    for index in range(len(part)):
        mel = torch.from_numpy(part.read(index)).float()
        room = max(0, len(mel) - 30)
        views = [mel] + [mel[start : start + 30] for start in (0, room // 2, room)]
        with torch.no_grad():
            scores = torch.stack([model(view[None])[0] for view in views]).mean(0)
        names.append(NAMES[int(scores.argmax())])
    assert [line.split(",")[1] for line in some.read_text().splitlines()[1:]] == names


@pytest.mark.parametrize(
    ("options", "code", "part"),
    [
        (["--split", "dev"], 1, "has no split dev, only train, val, test"),
        (["--shards", "nowhere"], 4, "nowhere"),
        (["--checkpoint", "nowhere.pt"], 1, "nowhere.pt: there is no such checkpoint"),
        (["--max-frames", "0"], 2, "max-frames"),
        (["--checkpoint", "."], 1, ".: there is no best checkpoint"),
        (["--shards", "n" * 300], 4, "File name too long. Run `shardprep build"),
    ],
)
def test_what_cannot_be_done_has_one_message_and_its_code(
    run: Path, tmp_path: Path, options: list[str], code: int, part: str
) -> None:
    result = predict(run, "--out", tmp_path / "out.csv", *options)
    assert (result.exit_code, result.stdout) == (code, "")
    assert part in result.stderr
    assert "Traceback" not in result.stderr


def test_a_run_without_the_checkpoint_asked_for_says_what_to_do(run: Path, tmp_path: Path) -> None:
    (run / BEST).unlink()
    said = predict(run).stderr
    newest = said.partition("it has not been validated yet: name ")[2].partition(" in its place")[0]
    assert predict(newest, "--out", tmp_path / "out.csv").exit_code == 0
    (tmp_path / "empty").mkdir()
    assert "no best checkpoint; train first: shardprep train" in predict(tmp_path / "empty").stderr
    assert "the folder does not exist; name that of a run" in predict(tmp_path / "none").stderr


def test_the_folder_of_the_runs_is_answered_with_their_names(run: Path) -> None:
    assert f"name one of the runs in it: {run}\n" in predict(run.parent).stderr


def write(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(rows) + "\n")
    return path


def test_a_score_counts_the_rows_of_the_truth(tmp_path: Path) -> None:
    truth = write(tmp_path / "truth.csv", "Id,Category", "a,x", "b,y")
    found = write(tmp_path / "found.csv", "Id,Category", "b,y", "c,z", "a,y")
    assert score_submission(found, truth) == (1, 2)
    # A test list may name a file twice.
    twice = write(tmp_path / "twice.csv", "Id,Category", "b,y", "a,y", "b,y")
    assert score_submission(twice, truth) == (1, 2)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["Id,Category", "a,x"], "1 of the 2 utterances .* the first is b"),
        (["a,x", "b,y"], "the first row is 'a,x', expected Id,Category"),
        (["Id,Category", "a,x", "b"], "line 3: 1 values, expected Id,Category"),
        (["Id,Category", "a,x", "b,y", "a,y"], "line 4: a occurs with two names"),
    ],
)
def test_a_file_that_cannot_be_scored_is_refused(
    tmp_path: Path, rows: list[str], message: str
) -> None:
    truth = write(tmp_path / "truth.csv", "Id,Category", "a,x", "b,y")
    with pytest.raises(PredictionError, match=message):
        score_submission(write(tmp_path / "found.csv", *rows), truth)
