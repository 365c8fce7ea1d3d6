"""The homework's code has the mistakes that it is known for, and only those."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conformer import ConformerBlock

from scripts.bench_train import homework_baseline as homework
from scripts.bench_train import homework_model as models

SIZES = {"dim": 16, "heads": 2, "head_dim": 8}
TINY = {"width": 16, "heads": 2, "head_dim": 8, "batch_size": 4, "device": "cpu"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(**options: Any) -> Any:
    torch.manual_seed(0)
    return models.HomeworkModel(40, 5, **SIZES, **options).eval()


@pytest.mark.parametrize("kind", models.KINDS)
@pytest.mark.parametrize(("axis", "seen"), [("wrong", True), ("right", False)])
def test_batch_mates_are_seen_on_the_wrong_axis_only(kind: str, axis: str, seen: bool) -> None:
    model = build(kind=kind, axis=axis)
    mel = torch.randn(3, 20, 40)
    together, alone = model(mel)[:1], model(mel[:1])
    assert torch.allclose(together, alone, atol=1e-5) != seen


@pytest.mark.parametrize(("axis", "seen"), [("wrong", False), ("right", True)])
def test_frames_in_their_order_matter_on_the_right_axis_only(axis: str, seen: bool) -> None:
    model = build(axis=axis)
    mel = torch.randn(1, 20, 40)
    same = torch.allclose(model(mel), model(mel[:, torch.randperm(20)]), atol=1e-5)
    assert same != seen


def test_the_right_axis_is_the_package_used_as_it_is_meant() -> None:
    model = build(axis="right")
    mel = torch.randn(2, 20, 40)
    block = ConformerBlock(dim=16, dim_head=8, heads=2).eval()
    block.load_state_dict(model.encoder.state_dict())
    expected = model.classifier(block(model.prenet(mel)).mean(1))
    assert torch.allclose(model(mel), expected, atol=1e-6)


def test_boss_subtracts_the_margin_only_from_the_true_speaker() -> None:
    model = build(kind="boss")
    cosines, labels = torch.rand(4, 5) * 2 - 1, torch.tensor([0, 3, 1, 1])
    logits = models.SCALE * cosines
    logits[range(4), labels] -= models.SCALE * models.MARGIN
    expected = -(logits.softmax(1)[range(4), labels]).log().mean()
    assert torch.allclose(model.loss(cosines, labels), expected, atol=1e-4)
    assert build(kind="boss")(torch.randn(4, 9, 40)).abs().max() <= 1 + 1e-5


def test_short_utterances_are_padded_and_long_ones_cut(make_dataset: Any) -> None:
    root = make_dataset(frames=(20, 200))
    source = homework.read_source(root)
    data = homework.HomeworkDataset(source.labelled, 100)
    random.seed(0)
    samples = [data[index] for index in range(len(data))]
    for (mel, label), (path, number) in zip(samples, source.labelled, strict=True):
        whole = torch.load(path, weights_only=True)
        starts = range(max(1, len(whole) - 99))
        assert any(torch.equal(mel, whole[start : start + 100]) for start in starts)
        assert int(label) == number
    batch, labels = homework.collate(samples)
    assert batch.shape == (24, 100, 40)
    assert len(labels) == 24
    short, (mel, _) = min(enumerate(samples), key=lambda pair: len(pair[1][0]))
    assert (batch[short, len(mel) :] == -20).all()


def test_the_schedule_rises_and_falls() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    schedule = homework.cosine_schedule(torch.optim.AdamW([weight], lr=1.0), 10, 110)
    rates = []
    for _ in range(110):
        rates.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    assert rates[0] == 0
    assert rates[10] == 1
    assert rates[60] == pytest.approx(0.5)
    assert schedule.get_last_lr()[0] == pytest.approx(0, abs=1e-9)
    assert [homework.warmup_steps(steps) for steps in (1001, 1000, 50)] == [1000, 100, 5]


def test_the_best_state_is_an_alias_so_the_last_weights_are_tested(
    make_dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_dataset(speakers=3, utterances=20)
    accuracies = iter([0.9, 0.2, 0.1])
    seen: list[torch.Tensor] = []

    def validate(model: Any, *_: Any) -> float:
        seen.append(model.prenet.weight.detach().clone())
        return next(accuracies)

    tested: list[torch.Tensor] = []
    predict = homework.predict

    def spy(model: Any, *arguments: Any) -> Any:
        tested.append(model.prenet.weight.detach().clone())
        return predict(model, *arguments)

    monkeypatch.setattr(homework, "validate", validate)
    monkeypatch.setattr(homework, "predict", spy)
    result = homework.train_baseline(root, 6, valid_steps=2, **TINY)
    assert result["val_accuracy"] == 0.9
    assert torch.equal(tested[0], seen[2])
    assert not torch.equal(tested[0], seen[0])


def test_a_run_is_a_function_of_its_seed_and_predicts_every_test_utterance(
    make_dataset: Callable[..., Path],
) -> None:
    root = make_dataset(speakers=3, utterances=20, test_utterances=4)
    one, two, other = (homework.train_baseline(root, 4, seed=seed, **TINY) for seed in (1, 1, 2))
    listed = [
        row["feature_path"]
        for row in json.loads((root / "testdata.json").read_text())["utterances"]
    ]
    assert list(one["predictions"]) == listed
    assert np.array_equal(one["embeddings"], two["embeddings"])
    assert not np.array_equal(one["embeddings"], other["embeddings"])
    assert one["embeddings"].shape == (4, 16)
    assert one["samples_per_s"] > 0
    assert 0 <= one["val_accuracy"] <= 1


def test_the_command_writes_what_it_predicts(
    make_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    root = make_dataset(speakers=3, utterances=20)
    words = [root, "--steps", 2, "--width", 16, "--heads", 2, "--head-dim", 8, "--batch", 4]
    words += ["--out", tmp_path / "s.csv", "--embeddings", tmp_path / "e.npz", "--json"]
    done = CliRunner().invoke(homework.main, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0
    assert json.loads(done.stdout)["steps"] == 2
    header, *rows = (tmp_path / "s.csv").read_text().splitlines()
    assert header == "Id,Category"
    assert len(rows) == 5
    with np.load(tmp_path / "e.npz") as kept:
        assert [f"{key}.pt" for key in kept["key"]] == [row.split(",")[0] for row in rows]
    too_large = [str(word) for word in [*words, "--batch", 7]]
    refused = CliRunner().invoke(homework.main, too_large)
    assert refused.exit_code == 2
    assert "take a smaller batch" in refused.stderr
