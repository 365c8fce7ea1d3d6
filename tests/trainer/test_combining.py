"""predict, score and embed with several models, against each model alone and a loop over them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click import Command
from click.testing import CliRunner, Result
from oracle import model_of
from saved_models import BEST, change_best, make_checkpoint

import shardprep
from shardprep_trainer import embed, predict, score
from shardprep_trainer.checkpoint.files import CheckpointFolder, load
from shardprep_trainer.checkpoint.find import holds_model
from shardprep_trainer.config.fields import Config
from shardprep_trainer.evaluation.combining import held_out
from shardprep_trainer.evaluation.suspects.leave_one_out import judge_labels
from shardprep_trainer.evaluation.wccn import Wccn

ConfigFactory = Callable[..., Config]

# As `shards` has them; `run` and `other` each have them in an order of their own.
SPEAKERS = ["id00000", "id00001", "id00002"]


@pytest.fixture
def other(make_config: ConfigFactory, tmp_path: Path) -> Path:
    """A run of another architecture than `run`, with its speakers in another order."""
    changes = {
        "model.encoder": "transformer",
        "model.dim": 24,
        "model.heads": 2,
        "model.head_dim": 12,
    }
    changes |= {"model.ff_dim": 48, "data.pad_value": 3.0}
    names = ("id00001", "id00002", "id00000")
    checkpoint = make_checkpoint(make_config(**changes), 3, speakers=names, longest_frames=70)
    CheckpointFolder(tmp_path / "other").save_best(checkpoint)
    return tmp_path / "other"


def invoke(command: Command, *words: object) -> Result:
    return CliRunner().invoke(command, [*map(str, words)])


def done(command: Command, *words: object) -> Result:
    result = invoke(command, *words)
    assert result.exit_code == 0, result.output
    return result


def score_json(*words: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(done(score.main, *words, "--json").stdout)
    return found


def predicted(tmp_path: Path, *words: object) -> list[str]:
    done(predict.main, *words, "--out", tmp_path / "out.csv")
    return [line.split(",")[1] for line in (tmp_path / "out.csv").read_text().splitlines()[1:]]


def unit(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def alone(run: Path, part: shardprep.Split) -> tuple[np.ndarray, np.ndarray]:
    """The oracle: embeddings (N, D) of length 1, and scores (N, 3) in the order of SPEAKERS."""
    checkpoint, model = load(run / BEST), model_of(run / BEST)
    embeddings, scores = [], []
    with torch.no_grad():
        for index in range(len(part)):
            mel = torch.from_numpy(part.read(index)).float()
            count = -(-len(mel) // checkpoint.longest_frames)
            ends = [len(mel) * n // count for n in range(count + 1)]
            pieces = [mel[None, a:b] for a, b in zip(ends, ends[1:], strict=False)]
            weights = [piece.shape[1] / len(mel) for piece in pieces]
            rows = [unit(model.embed(piece).numpy())[0] for piece in pieces]
            own = [model(piece)[0].double().numpy() for piece in pieces]
            embeddings.append(np.average(rows, axis=0, weights=weights))
            scores.append(np.average(own, axis=0, weights=weights))
    columns = [checkpoint.speakers.index(name) for name in SPEAKERS]
    return unit(np.array(embeddings)), np.array(scores)[:, columns]


def teach(run: Path, shards: Path, which: int) -> None:
    """Let the head know the speakers a little, each by one utterance of train."""
    train, checkpoint = shardprep.open_shards(shards)["train"], load(run / BEST)
    embeddings = alone(run, train)[0]
    numbers = [SPEAKERS.index(name) for name in checkpoint.speakers]
    rows = [embeddings[train.labels == number][which] for number in numbers]
    taught = torch.from_numpy(np.array(rows) - embeddings.mean(0)).float()
    change_best(run, weights={**checkpoint.weights, "classifier.weight": taught})


def named(scores: np.ndarray) -> list[str]:
    return [SPEAKERS[number] for number in scores.argmax(1)]


def test_speakers_are_named_by_the_weighted_mean_of_aligned_scores(
    run: Path, other: Path, shards: Path, tmp_path: Path
) -> None:
    teach(run, shards, 0)
    part = shardprep.open_shards(shards)["train"]
    found = score_json(run, other, "--split", "train", "--max-frames", 300)
    combination = found["combination"]
    assert [model["checkpoint"] for model in found["models"]] == [
        str(folder / BEST) for folder in (other, run)
    ]
    assert (combination["utterances"], len(combination["ways"])) == (5, 2)
    by_other, by_run = (alone(folder, part)[1] for folder in (other, run))
    first, second = combination["weights"]
    expected = named(first * by_other + second * by_run)
    chosen = ("--split", "train", "--max-frames", 300)
    assert predicted(tmp_path, run, other, *chosen) == expected
    assert named(by_run) != named(by_other)
    truth = [SPEAKERS[label] for label in part.labels]
    right = sum(a == b for a, b in zip(expected, truth, strict=True))
    assert found["accuracy"] == right / 24


def test_the_way_is_told_and_has_the_lower_cross_entropy(
    run: Path, other: Path, shards: Path, tmp_path: Path
) -> None:
    teach(run, shards, 0)
    teach(other, shards, 4)
    data = shardprep.open_shards(shards)
    found = score_json(run, other)
    ways = found["combination"]["ways"]
    assert found["combination"]["mean_of"] == ways[0]["mean_of"]
    # The oracle: the five utterances of val, at a grid of scales.
    val, chosen = data["val"], held_out.sample(data["val"].frames, np.arange(6), 0)
    truth = val.labels[chosen]
    each = [alone(folder, val)[1][chosen] for folder in (other, run)]
    for way in ways:
        temperatures = way["temperatures"] if len(way["temperatures"]) > 1 else [1.0, 1.0]
        mean = sum(own / t for own, t in zip(each, temperatures, strict=True))
        costs = []
        for scale in np.geomspace(1e-3, 100, 5000) / mean.std():
            scaled = scale * (mean - mean.max(1, keepdims=True))
            costs.append((np.log(np.exp(scaled).sum(1)) - scaled[range(5), truth]).mean())
        # The prior keeps the scale from its best value a little.
        assert min(costs) - 1e-6 <= way["cross_entropy"] <= min(costs) + 0.03
    assert ways[0]["cross_entropy"] <= ways[1]["cross_entropy"]
    told = done(predict.main, run, other, "--out", tmp_path / "x.csv").stderr
    assert f"combined by the mean of {ways[0]['mean_of']}; cross-entropy on 5 utterances" in told
    assert "note: val has these utterances, too" not in told
    assert "note: val has these utterances, too" in done(score.main, run, other).stderr


def test_the_order_of_the_models_changes_nothing(run: Path, other: Path, tmp_path: Path) -> None:
    options = ("--split", "train", "--as-norm")
    assert score_json(run, other, *options) == score_json(other, run, *options)
    for backend in ("head", "wccn"):
        chosen = ("--split", "train", "--backend", backend)
        names = predicted(tmp_path, run, other, *chosen)
        assert names == predicted(tmp_path, other, run, *chosen)
    done(embed.main, run, other, "--out", tmp_path / "a.npz")
    done(embed.main, other, run, "--out", tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_each_model_is_scored_as_it_is_alone(run: Path, other: Path) -> None:
    options = ("--split", "train", "--as-norm", "--cohort-size", 2, "--tta", 1)
    found = score_json(run, other, *options)
    for model, folder in zip(found["models"], (other, run), strict=True):
        own = score_json(folder, *options)
        same = ("checkpoint", "step", "backend", "accuracy", "top5_accuracy", "tta_frames")
        assert [model[key] for key in same] == [own[key] for key in same]
        assert model["eer"] == pytest.approx(own["eer"], abs=1e-6)
        assert model["min_dcf"] == pytest.approx(own["min_dcf"], abs=1e-6)
        assert own["models"] == [{key: own[key] for key in own["models"][0]}]
        assert own["combination"] is None
        assert found.keys() == own.keys()
    assert (found["checkpoint"], found["step"], found["as_chosen"]) == (None, None, None)
    lines = done(score.main, run, other, *options).stdout.splitlines()
    assert lines[0].startswith("top-1 accuracy on train: ")
    (eer,) = (line for line in lines if line.startswith("EER: "))
    assert eer.startswith(f"EER: {100 * found['eer']:.2f} %")
    assert lines[-2:] == [
        f"alone, {model['checkpoint']}: top-1 accuracy {model['accuracy']:.4f}, "
        f"EER {100 * model['eer']:.2f} %, minDCF {model['min_dcf']:.4f}"
        for model in found["models"]
    ]


def test_trials_are_scored_by_the_mean_of_cosines(
    run: Path, other: Path, shards: Path, tmp_path: Path
) -> None:
    part, out = shardprep.open_shards(shards)["val"], tmp_path / "scores.tsv"
    done(score.main, run, other, "--scores", out)
    position = {key: number for number, key in enumerate(part.keys.tolist())}
    embeddings = [alone(folder, part)[0] for folder in (run, other)]
    rows = [line.split("\t") for line in out.read_text().splitlines()[1:]]
    assert len(rows) == 6
    for enroll, test, found, *_ in rows:
        a, b = position[enroll], position[test]
        assert float(found) == pytest.approx(
            np.mean([own[a] @ own[b] for own in embeddings]), abs=1e-5
        )


def test_a_backend_of_each_model_is_combined(
    run: Path, other: Path, shards: Path, tmp_path: Path
) -> None:
    data = shardprep.open_shards(shards)
    weights = score_json(run, other, "--backend", "wccn")["combination"]["weights"]
    total = np.zeros((5, 3))
    for weight, folder in zip(weights, (other, run), strict=True):
        train, test = (alone(folder, data[name])[0] for name in ("train", "test"))
        total += weight * Wccn(train, data["train"].labels).scores(test)
    assert predicted(tmp_path, run, other, "--backend", "wccn") == named(total)


def test_head_and_backend_are_combined_where_the_recipes_say_so(
    run: Path, other: Path, shards: Path, tmp_path: Path
) -> None:
    config = load(other / BEST).config
    object.__setattr__(config.predict, "backend", "wccn")
    change_best(other, config=config)
    data, found = shardprep.open_shards(shards), score_json(run, other)
    assert (found["backend"], found["models"][0]["backend"]) == ("head and wccn", "wccn")
    first, second = found["combination"]["weights"]
    train, test = (alone(other, data[name])[0] for name in ("train", "test"))
    scores = first * Wccn(train, data["train"].labels).scores(test)
    scores += second * alone(run, data["test"])[1]
    assert predicted(tmp_path, run, other) == named(scores)


def test_every_utterance_is_read_once_for_all_models(
    run: Path, other: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Counter[tuple[str, int]] = Counter()
    segments, one = shardprep.Split.segments, shardprep.Split.read

    def count_many(self: shardprep.Split, indices: Any, *rest: Any) -> Any:
        read.update((self.name, int(index)) for index in indices)
        return segments(self, indices, *rest)

    def count_one(self: shardprep.Split, index: int) -> Any:
        read[f"one of {self.name}", index] += 1
        return one(self, index)

    monkeypatch.setattr(shardprep.Split, "segments", count_many)
    monkeypatch.setattr(shardprep.Split, "read", count_one)
    for backend, splits in (("head", {"test": 5}), ("wccn", {"test": 5, "train": 24})):
        read.clear()
        predicted(tmp_path, run, other, "--backend", backend)
        assert set(read.values()) == {1}
        expected = {**splits, "one of val": 5}
        assert Counter(name for name, _ in read) == expected


def test_without_val_cosines_are_averaged_and_that_is_told(
    run: Path, other: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bare"
    options = shardprep.BuildOptions(val_fraction=0.0, workers=1)
    shardprep.build_shards(tmp_path / "Dataset", folder, options)
    result = done(predict.main, run, other, "--shards", folder, "--out", tmp_path / "x.csv")
    assert f"note: combined by the mean of cosines: {folder} has too few utterances" in (
        result.stderr
    )
    part = shardprep.open_shards(folder)["test"]
    total = alone(run, part)[1] + alone(other, part)[1]
    rows = (tmp_path / "x.csv").read_text().splitlines()[1:]
    assert [row.split(",")[1] for row in rows] == named(total)


def test_joined_embeddings_have_the_mean_of_cosines(
    run: Path, other: Path, shards: Path, tmp_path: Path
) -> None:
    part, out = shardprep.open_shards(shards)["val"], tmp_path / "x.npz"
    done(embed.main, run, other, "--out", out)
    with np.load(out, allow_pickle=False) as file:
        found = {name: file[name] for name in file.files}
    rows = found["embeddings"]
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    expected = np.mean([own @ own.T for own in (alone(f, part)[0] for f in (run, other))], axis=0)
    assert np.allclose(rows @ rows.T, expected, atol=1e-5)
    assert found["checkpoint"].tolist() == [str(folder / BEST) for folder in (other, run)]
    assert (found["step"].tolist(), found["tta_frames"].tolist()) == ([3, 5], [0, 0])
    # Each part is a model's own direction.
    first, second = np.split(rows, np.cumsum(found["widths"])[:-1], axis=1)
    for part_rows, folder in ((first, other), (second, run)):
        assert np.allclose(unit(part_rows), alone(folder, part)[0], atol=1e-5)
    done(embed.main, run, other, "--out", tmp_path / "x.parquet")
    about = pq.read_schema(tmp_path / "x.parquet").metadata
    assert about[b"widths"].decode() == str(found["widths"].tolist())


def test_models_that_know_different_speakers_make_trials_but_name_nobody(
    run: Path, other: Path, tmp_path: Path
) -> None:
    change_best(other, speakers=("id00001", "stranger", "id00000"))
    result = invoke(predict.main, run, other, "--out", tmp_path / "x.csv")
    assert (result.exit_code, (tmp_path / "x.csv").exists()) == (1, False)
    missing = f"{other / BEST} does not know 1 of the speakers whom {run / BEST} knows, such as "
    assert missing + "id00002" in result.stderr
    assert "--backend wccn" in result.stderr
    scored = done(score.main, run, other, "--json")
    found = json.loads(scored.stdout)
    assert (found["accuracy"], found["combination"]) == (None, None)
    assert "note: the models know different speakers" in scored.stderr
    assert found["eer"] is not None
    assert [model["accuracy"] for model in found["models"]] == [
        score_json(folder)["accuracy"] for folder in (other, run)
    ]
    assert predicted(tmp_path, run, other, "--backend", "wccn")


def test_what_makes_no_sense_is_refused(
    run: Path, other: Path, shards: Path, make_config: ConfigFactory, tmp_path: Path
) -> None:
    again = tmp_path / "link"
    again.symlink_to(run)
    elsewhere = tmp_path / "elsewhere"
    config = make_config(**{"data.shards": "far/away"})
    CheckpointFolder(elsewhere).save_best(make_checkpoint(config, 2))
    cases: list[tuple[list[object], int, str]] = [
        ([run, run], 2, f"{run / BEST}: named twice; name each model once"),
        ([run, again], 2, "is the same file); name each model once"),
        ([run, run / "model"], 2, "named twice"),
        ([run, other, "--checkpoint", run / BEST], 2, "is one file, but 2 models are named"),
        ([run, elsewhere], 2, f"trained on different shards ({shards}; far/away)"),
        ([run, tmp_path / "none"], 1, "none: there is no best checkpoint"),
    ]
    for words, code, part in cases:
        result = invoke(predict.main, *words, "--out", tmp_path / "x.csv")
        assert (result.exit_code, part in result.stderr) == (code, True), result.stderr
    assert predicted(tmp_path, run, elsewhere, "--shards", shards)
    change_best(other, n_mels=80)
    result = invoke(predict.main, run, other, "--out", tmp_path / "x.csv")
    assert f"40 mel bins a frame, but {other / BEST} was trained on 80" in result.stderr


def test_a_model_that_diverged_is_named(run: Path, other: Path, tmp_path: Path) -> None:
    weights = load(other / BEST).weights
    name = next(name for name in weights if name.startswith("encoder.stem."))
    change_best(other, weights={**weights, name: torch.full_like(weights[name], torch.nan)})
    result = invoke(predict.main, run, other, "--out", tmp_path / "x.csv")
    assert result.exit_code == 1
    assert f"{other / BEST}: the embeddings of 5 utterances of val are not finite" in result.stderr


def test_models_are_told_from_recordings_by_what_they_hold(run: Path, tmp_path: Path) -> None:
    (tmp_path / "voices").mkdir()
    (tmp_path / "voices" / "a.wav").write_bytes(b"")
    models = [run, run / "model", run / BEST, run / "checkpoints" / "step-00000009.pt"]
    others = [tmp_path / "voices", tmp_path / "voices" / "a.wav", tmp_path / "list.csv", tmp_path]
    assert [holds_model(place) for place in [*models, *others]] == [True] * 4 + [False] * 4


def test_suspects_are_judged_by_joined_embeddings(
    run: Path, other: Path, shards: Path, tmp_path: Path
) -> None:
    data, out, truth = shardprep.open_shards(shards), tmp_path / "out.csv", tmp_path / "truth.csv"
    part = data["train"]
    labels = np.where(np.arange(len(part)) % 7 == 0, (part.labels + 1) % 3, part.labels)
    rows = zip(part.keys, (data.speakers[label] for label in labels), strict=True)
    truth.write_text("Id,Category\n" + "".join(f"{key},{name}\n" for key, name in rows))
    found = score_json(run, other, "--suspects", out, "--labels", truth)
    joined = np.hstack([alone(path, part)[0] for path in (run, other)])
    expected = judge_labels(joined, labels)
    keys = {line.split(",")[0] for line in out.read_text().splitlines()[1:]}
    assert found["suspects"] == len(keys) > 0
    # float32 cannot tell the smallest margins from 0.
    assert {*part.keys[expected.position[expected.margin < -1e-4]]} <= keys
    assert keys <= {*part.keys[expected.position[expected.margin < 1e-4]]}
    assert found["threshold"] == pytest.approx(expected.threshold, abs=1e-3)
