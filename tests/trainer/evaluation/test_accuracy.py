"""Evaluation: whole utterances, each once, the same counts at any world size and batch size."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import shardprep
from shardprep_trainer.config.fields import ModelConfig
from shardprep_trainer.evaluation import accuracy
from shardprep_trainer.evaluation.accuracy import Evaluation, collect, evaluate, grade
from shardprep_trainer.evaluation.views import Views
from shardprep_trainer.learning.losses import SoftmaxLoss
from shardprep_trainer.model.build import build_model
from shardprep_trainer.model.model import SpeakerNetwork

CPU = torch.device("cpu")


@pytest.fixture
def model() -> SpeakerNetwork:
    torch.manual_seed(0)
    sizes = {"dim": 16, "heads": 2, "head_dim": 8, "ff_dim": 32, "kernel_size": 7}
    return build_model(ModelConfig(classifier="linear", **sizes), 40, 3).eval()


@pytest.fixture
def split(shards: Path) -> shardprep.Split:
    return shardprep.open_shards(shards)["train"]


def one_by_one(model: SpeakerNetwork, split: shardprep.Split) -> tuple[list[int], float]:
    """The oracle: every utterance alone, without padding, in the split's order."""
    answers, loss = [], 0.0
    with torch.no_grad():
        for index in range(len(split)):
            mel = torch.from_numpy(split.read(index)).float().unsqueeze(0)
            scores = model(mel)[0].double()
            answers.append(int(scores.argmax()))
            loss -= float(scores.log_softmax(0)[int(split.labels[index])])
    return answers, loss


def on_ranks(
    model: SpeakerNetwork,
    split: shardprep.Split,
    world_size: int,
    max_frames: int,
    keep: np.ndarray | None = None,
) -> list[Evaluation]:
    """Evaluate on ranks that are threads with a real all-reduce between them."""
    barrier = threading.Barrier(world_size, timeout=60)
    slots: list[Tensor] = [torch.zeros(())] * world_size
    results: list[Evaluation | None] = [None] * world_size

    def work(rank: int) -> None:
        def reduce(total: Tensor) -> Tensor:
            slots[rank] = total
            barrier.wait()
            summed = torch.stack(slots).sum(0)
            barrier.wait()
            return summed

        loader = shardprep.UtteranceLoader(
            split, max_frames=max_frames, rank=rank, world_size=world_size
        )
        results[rank] = evaluate(
            # As in a process of its own.
            copy.deepcopy(model),
            loader,
            split.labels,
            device=CPU,
            criterion=SoftmaxLoss(),
            reduce=reduce,
            keep=keep,
        )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [result for result in results if result is not None]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("max_frames", [1, 700])
def test_any_world_size_and_batch_size_gives_what_utterances_give_alone(
    model: SpeakerNetwork, split: shardprep.Split, world_size: int, max_frames: int
) -> None:
    answers, loss = one_by_one(model, split)
    results = on_ranks(model, split, world_size, max_frames)
    assert len(results) == world_size
    for result in results:
        assert result.predictions.tolist() == answers
        assert result.labelled == len(split) == 24
        assert result.correct == sum(a == b for a, b in zip(answers, split.labels, strict=True))
        assert result.accuracy == result.correct / 24
        assert result.loss == pytest.approx(loss / 24, rel=1e-4)


@pytest.mark.parametrize("classifier", ["linear", "mlp", "cosine"])
def test_embeddings_that_are_kept_are_the_same_at_any_world_size(
    split: shardprep.Split, classifier: str
) -> None:
    torch.manual_seed(0)
    sizes = {"dim": 16, "heads": 2, "head_dim": 8, "ff_dim": 32, "kernel_size": 7}
    config = ModelConfig(classifier=classifier, embedding_dim=12, **sizes)
    model = build_model(config, 40, 3).eval()
    keep = np.array([23, 0, 7, 8])
    (one,) = on_ranks(model, split, 1, 700, keep)
    assert one.embeddings is not None
    with torch.no_grad():
        for position, found in zip(keep, one.embeddings, strict=True):
            alone = model.embed(torch.from_numpy(split.read(position)).float()[None])[0]
            assert np.allclose(found, alone.numpy(), atol=1e-5)
    # 9 ranks are more than there are batches.
    for result in on_ranks(model, split, 2, 700, keep) + on_ranks(model, split, 9, 700, keep):
        assert result.embeddings is not None
        assert np.array_equal(result.embeddings, one.embeddings)
        assert result.predictions.tolist() == one.predictions.tolist()


def test_an_utterance_counted_twice_or_left_out_is_noticed(
    model: SpeakerNetwork, split: shardprep.Split
) -> None:
    batches = list(shardprep.UtteranceLoader(split, max_frames=700))
    for wrong in (batches[1:], [*batches, batches[0]]):
        with pytest.raises(AssertionError, match="twice|not evaluated"):
            evaluate(model, wrong, split.labels, device=CPU)


def test_what_may_be_left_out_counts_nowhere(model: SpeakerNetwork, split: shardprep.Split) -> None:
    batches = list(shardprep.UtteranceLoader(split, max_frames=700))
    whole = evaluate(model, batches, split.labels, device=CPU)
    gone = batches[0]["index"].numpy()
    part = evaluate(model, batches[1:], split.labels, device=CPU, incomplete=True)
    assert (part.predictions[gone] == -1).all()
    assert part.labelled == whole.labelled - len(gone)
    right = whole.predictions[gone] == split.labels[gone]
    assert part.correct == whole.correct - int(right.sum())
    with pytest.raises(AssertionError, match="twice"):
        evaluate(model, [*batches, batches[0]], split.labels, device=CPU, incomplete=True)


def test_unlabelled_utterances_are_predicted_but_not_counted(
    model: SpeakerNetwork, shards: Path
) -> None:
    split = shardprep.open_shards(shards)["test"]
    result = evaluate(
        model, shardprep.UtteranceLoader(split), split.labels, device=CPU, criterion=SoftmaxLoss()
    )
    assert len(result.predictions) == 5
    assert (result.correct, result.labelled, result.accuracy, result.loss) == (0, 0, 0.0, 0.0)


def test_labelled_ones_among_unlabelled_have_their_own_loss(
    model: SpeakerNetwork, split: shardprep.Split
) -> None:
    batches = list(shardprep.UtteranceLoader(split, max_frames=700))
    labels = np.full(len(split), -1)
    labels[3] = split.labels[3]
    for batch in batches:
        batch["label"] = torch.from_numpy(labels)[batch["index"]]
    result = evaluate(model, batches, labels, device=CPU, criterion=SoftmaxLoss())
    with torch.no_grad():
        scores = model(torch.from_numpy(split.read(3)).float().unsqueeze(0))[0].double()
    assert result.labelled == 1
    assert result.loss == pytest.approx(-float(scores.log_softmax(0)[labels[3]]), rel=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_evaluated_without_dropout_and_left_as_it_was(
    model: SpeakerNetwork, split: shardprep.Split, training: bool
) -> None:
    model.train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loader = shardprep.UtteranceLoader(split)
    results = [evaluate(model, loader, split.labels, device=CPU) for _ in range(2)]
    assert np.array_equal(results[0].predictions, results[1].predictions)
    assert model.training is training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Table(torch.nn.Module):
    """Answers from a table (N, S): the only mel value of an utterance is its row."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, mel: Tensor, lengths: Tensor | None = None) -> Tensor:
        return self.rows[mel[:, 0, 0].long()]


def test_the_five_highest_count_and_ties_go_as_in_argmax() -> None:
    # Few values, so that ties abound.
    rows = torch.randint(0, 4, (60, 9), generator=torch.Generator().manual_seed(0)).float()
    labels = np.random.default_rng(0).integers(-1, 9, 60)
    index = torch.arange(60)
    batch = {
        "mel": index.float().view(60, 1, 1),
        "label": torch.from_numpy(labels),
        "length": torch.ones(60, dtype=torch.int64),
        "index": index,
    }
    result = evaluate(Table(rows), [batch], labels, device=CPU)
    best, right = 0, 0
    for row, label in zip(rows.tolist(), labels, strict=True):
        ranked = sorted(range(9), key=lambda speaker: (-row[speaker], speaker))
        best += label in ranked[:5]
        right += label == ranked[0]
    assert (result.correct, result.correct_top5) == (right, best)
    assert result.top5_accuracy == best / (labels >= 0).sum()
    nothing = evaluate(Table(rows * torch.nan), [batch], labels, device=CPU)
    assert nothing.correct_top5 == 0


@pytest.mark.parametrize("max_frames", [1, 700])
def test_collected_embeddings_stand_in_the_order_of_the_split(
    model: SpeakerNetwork, split: shardprep.Split, max_frames: int
) -> None:
    loader = shardprep.UtteranceLoader(split, max_frames=max_frames)
    model.train()
    found = collect([Views(model)], loader, [split.labels], device=CPU)
    assert model.training
    model.eval()
    plain = evaluate(model, loader, split.labels, device=CPU)
    (embeddings,), (evaluation,) = found.embeddings, found.evaluations
    assert embeddings.dtype == np.float32
    assert evaluation.predictions.tolist() == plain.predictions.tolist()
    assert evaluation.correct_top5 == plain.correct_top5 == 24
    with torch.no_grad():
        for index, embedding in enumerate(embeddings):
            alone = model.embed(torch.from_numpy(split.read(index)).float()[None])[0]
            assert np.allclose(embedding, alone.numpy(), atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 6, 7])
def test_embeddings_are_graded_a_block_at_a_time(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardprep_trainer.evaluation.accuracy._BLOCK", 2)
    random, sizes = np.random.default_rng(0), []
    embeddings = random.normal(size=(count, 8)).astype(np.float32)
    labels = random.integers(-1, 8, count)

    def score(block: np.ndarray) -> np.ndarray:
        sizes.append(len(block))
        return block

    found = grade(score, embeddings, labels)
    best = np.argsort(-embeddings, axis=1)
    known = labels >= 0
    assert found.predictions.tolist() == best[:, 0].tolist()
    assert found.labelled == known.sum()
    assert found.correct == (best[:, 0] == labels)[known].sum()
    assert found.correct_top5 == (best[:, :5] == labels[:, None]).any(1)[known].sum()
    assert max(sizes, default=0) <= 2


def test_memory_is_given_back_after_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    # Else it grows by batches of many lengths, to gigabytes.
    given_back: list[torch.device] = []
    monkeypatch.setattr(accuracy, "return_memory", given_back.append)
    batches = [
        {"mel": torch.full((1, 3, 4), at), "length": torch.tensor([3]), "index": torch.tensor([at])}
        for at in range(3)
    ]
    evaluate(Table(torch.randn(3, 5)), batches, np.zeros(3, np.int64), device=CPU)
    assert given_back == [CPU] * 3
