"""Accuracy on whole utterances, each counted exactly once at any number of processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shardprep_trainer.config.fields import LONGEST_FRAMES
from shardprep_trainer.evaluation.pieces import in_pieces
from shardprep_trainer.evaluation.views import Views
from shardprep_trainer.model.build import model_inputs
from shardprep_trainer.model.cpu_kernels import return_memory

Criterion = Callable[[Tensor, Tensor], Tensor]
Labels = NDArray[np.signedinteger[Any]]
Tensors = Sequence[Tensor]

TOP = 5
# Embeddings that are scored at a time: against 6,000 speakers that is 100 MB of scores.
_BLOCK = 4096


@dataclass(frozen=True)
class Evaluation:
    """Counts over a split; ratios are made from them last, never averaged."""

    predictions: Labels
    """Class of each utterance (N,), in the split's own order; -1 for one that was left out."""
    correct: int
    labelled: int
    loss_sum: float
    """Sum over the labelled utterances; 0 without a criterion."""
    correct_top5: int = 0
    """Labelled utterances whose speaker is among the five that score highest."""
    embeddings: NDArray[np.float32] | None = None
    """(K, D) of the utterances whose embeddings were asked for, else None; 0 for one left out."""

    @property
    def accuracy(self) -> float:
        """Share of the labelled utterances that were recognised, 0 where none is labelled."""
        return self.correct / max(1, self.labelled)

    @property
    def top5_accuracy(self) -> float:
        """Share of the labelled utterances whose speaker is among the five highest."""
        return self.correct_top5 / max(1, self.labelled)

    @property
    def loss(self) -> float:
        """Mean loss of the labelled utterances, 0 where none is labelled."""
        return self.loss_sum / max(1, self.labelled)


@dataclass(frozen=True)
class Collected:
    """What models make of the utterances of a split."""

    embeddings: tuple[NDArray[np.float32], ...]
    """Of each model (N, D), in the split's own order."""
    evaluations: tuple[Evaluation, ...]
    """How well they were recognised in each way that was asked for; without a loss."""


def on_one_process(total: Tensor) -> Tensor:
    """The sum over the ranks where there is only one."""
    return total


def evaluate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    labels: Labels,
    *,
    device: torch.device,
    criterion: Criterion | None = None,
    reduce: Callable[[Tensor], Tensor] = on_one_process,
    incomplete: bool = False,
    keep: Labels | None = None,
) -> Evaluation:
    """Classify every utterance of a split, whole.

    Args:
        model: Maps mel (B, T, F) and lengths (B,) to logits (B, S); left in the mode it was in.
        batches: This rank's part of the split: `mel`, `length`, and `index`, the utterance's
            position in the split. Ranks may have different numbers of batches.
        labels: Class of every utterance of the split (N,), -1 where unknown.
        device: Where the model is.
        criterion: Mean loss of logits (B, S) and labels (B,); None leaves the loss out.
        reduce: Sums a tensor over the ranks; called the same number of times on each.
        incomplete: Whether the batches may leave utterances out, as damaged ones are.
        keep: Positions (K,) of the utterances whose embeddings are returned, each once; the model
            must be a `SpeakerNetwork`. None returns none.

    Returns:
        Counts over the whole split, equal on every rank.
    """
    tally = _Tally(labels, device)
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    truth = torch.from_numpy(labels.astype(np.int64))
    kept = None if keep is None else _Kept(model.get_submodule("classifier"), keep, len(labels))

    def run(mel: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = model(mel, lengths).float()
        return logits[:, :0] if kept is None else kept.last, logits

    with _evaluating(model), kept or contextlib.nullcontext():
        for batch in _freeing(batches, device):
            embedding, logits = in_pieces(run, *model_inputs(batch, device), LONGEST_FRAMES)
            tally.add(batch["index"], logits)
            if kept is not None:
                kept.add(batch["index"], embedding)
            if criterion is not None:
                loss_sum += _summed_loss(criterion, logits, truth[batch["index"]])
    counts = tally.evaluation(reduce, reduce(loss_sum), incomplete=incomplete)
    return counts if kept is None else replace(counts, embeddings=kept.embeddings(reduce))


def as_scored(embeddings: Tensors, scores: Tensors) -> Tensors:
    """The scores of each model, as its head gives them."""
    return scores


def collect_scores(
    models: Sequence[Views],
    batches: Iterable[Mapping[str, Tensor]],
    *,
    device: torch.device,
    score: Callable[[Tensors, Tensors], Tensors] = as_scored,
) -> tuple[Labels, list[NDArray[np.float32]]]:
    """Embed and score a few utterances; see `collect` for the arguments.

    Returns:
        Positions (K,) of the utterances as they came, and for each way of scoring (K, S).
    """
    positions, rows = [], []
    with _evaluating(*models):
        for batch in _freeing(batches, device):
            positions.append(batch["index"].numpy())
            found = score(*_embed_and_score(models, batch, device))
            rows.append([own.cpu().numpy() for own in found])
    return np.concatenate(positions), [np.concatenate(own) for own in zip(*rows, strict=True)]


def collect(
    models: Sequence[Views],
    batches: Iterable[Mapping[str, Tensor]],
    labels: Sequence[Labels],
    *,
    device: torch.device,
    score: Callable[[Tensors, Tensors], Tensors] = as_scored,
) -> Collected:
    """Embed and classify every utterance of a split, on one process.

    Args:
        models: On the device; left in the mode that they were in.
        batches: The whole split, as `evaluate` wants it.
        labels: For each way of scoring, the class of every utterance of the split (N,), -1 where
            unknown; at least one.
        device: Where the models are.
        score: From embeddings (B, D) and scores (B, S) of each model to the scores by each way.

    Returns:
        Embeddings and counts; of the scores no more is kept, for they are (N, S).
    """
    tallies = [_Tally(own, device) for own in labels]
    embeddings = [np.empty((0, 0), np.float32)] * len(models)
    with _evaluating(*models):
        for batch in _freeing(batches, device):
            found, scores = _embed_and_score(models, batch, device)
            for tally, own in zip(tallies, score(found, scores), strict=True):
                tally.add(batch["index"], own)
            if not embeddings[0].size:
                embeddings = [np.empty((len(labels[0]), own.shape[1]), np.float32) for own in found]
            for rows, own in zip(embeddings, found, strict=True):
                rows[batch["index"].numpy()] = own.cpu().numpy()
    return Collected(tuple(embeddings), tuple(tally.evaluation() for tally in tallies))


def grade(
    score: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    embeddings: NDArray[np.float32],
    labels: Labels,
) -> Evaluation:
    """Classify embeddings, a block at a time.

    Args:
        score: Maps embeddings (B, D) to scores (B, S), the higher the likelier.
        embeddings: (N, D).
        labels: Class of each (N,), -1 where unknown.

    Returns:
        Counts; there is no loss.
    """
    tally = _Tally(labels, torch.device("cpu"))
    for at in range(0, len(labels), _BLOCK):
        block = embeddings[at : at + _BLOCK]
        tally.add(torch.arange(at, at + len(block)), torch.from_numpy(score(block)))
    return tally.evaluation()


def _embed_and_score(
    models: Sequence[Views], batch: Mapping[str, Tensor], device: torch.device
) -> tuple[Tensors, Tensors]:
    """Embeddings (B, D) and scores (B, S) of each model; the batch goes to the device once."""
    inputs = model_inputs(batch, device)
    found = [model.embed_and_score(*inputs) for model in models]
    return [own.float() for own, _ in found], [own.float() for _, own in found]


def _freeing(
    batches: Iterable[Mapping[str, Tensor]], device: torch.device
) -> Iterator[Mapping[str, Tensor]]:
    """The batches; what one has taken on a CPU is given back before the next."""
    for batch in batches:
        yield batch
        return_memory(device)


@contextlib.contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    """Without dropout and gradients; the models are left in the mode that they were in."""
    training = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for model, mode in zip(models, training, strict=True):
            model.train(mode)


class _Kept:
    """The embeddings of some utterances, as a model gives them to its classifier.

    The model is called as a whole, as ever: its `forward` may be wrapped for mixed precision.

    Attributes:
        last: (B, D) of the last call.
    """

    def __init__(self, classifier: nn.Module, keep: Labels, count: int) -> None:
        self._classifier = classifier
        weight = next(classifier.parameters())
        self._rows = torch.full((count,), -1)
        self._rows[torch.from_numpy(keep)] = torch.arange(len(keep))
        # Every rank knows the width, also one without a batch.
        self._found = weight.new_zeros((len(keep), weight.shape[1]), dtype=torch.float32)
        self.last = self._found

    def __enter__(self) -> None:
        self._hook = self._classifier.register_forward_pre_hook(self._take)

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _take(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.last = inputs[0]

    def add(self, index: Tensor, embeddings: Tensor) -> None:
        """Keep the embeddings (B, D) of utterances at positions `index` (B,) that are wanted."""
        rows = self._rows[index]
        wanted = rows >= 0
        chosen, rows = (each.to(self._found.device) for each in (wanted, rows[wanted]))
        self._found[rows] = embeddings[chosen].float()

    def embeddings(self, reduce: Callable[[Tensor], Tensor]) -> NDArray[np.float32]:
        """The embeddings (K, D) that all ranks have kept: every row is of one rank."""
        found: NDArray[np.float32] = reduce(self._found).cpu().numpy()
        return found


class _Tally:
    """The answers to a split, gathered by position, in any order and number of batches."""

    def __init__(self, labels: Labels, device: torch.device) -> None:
        self._labels = labels
        self._truth = torch.from_numpy(labels.astype(np.int64)).to(device)
        # Prediction, times seen, and the place of the truth; adding gathers by index.
        self._found = torch.zeros(3, len(labels), dtype=torch.int64, device=device)

    def add(self, index: Tensor, logits: Tensor) -> None:
        """Take note of logits (B, S) of the utterances at positions `index` (B,)."""
        index = index.to(logits.device, non_blocking=True)
        place = _place(logits, self._truth[index])
        answers = torch.stack((logits.argmax(1), torch.ones_like(index), place))
        self._found.index_add_(1, index, answers)

    def evaluation(
        self,
        reduce: Callable[[Tensor], Tensor] = on_one_process,
        loss_sum: Tensor | None = None,
        *,
        incomplete: bool = False,
    ) -> Evaluation:
        """The counts over all ranks; `incomplete` if utterances may have been left out."""
        predictions, seen, place = reduce(self._found).cpu().numpy()
        assert (seen <= 1).all(), "an utterance was evaluated twice"
        assert incomplete or seen.all(), "an utterance was not evaluated"
        predictions[seen == 0] = -1
        known = (self._labels >= 0) & (seen == 1)
        return Evaluation(
            predictions=predictions,
            correct=int((predictions[known] == self._labels[known]).sum()),
            labelled=int(known.sum()),
            loss_sum=0.0 if loss_sum is None else loss_sum.item(),
            correct_top5=int((place[known] < TOP).sum()),
        )


def _place(logits: Tensor, truth: Tensor) -> Tensor:
    """How many classes are ahead of the true one (B,); of equals the first is, as in argmax."""
    truth = truth.clamp(min=0).unsqueeze(1)
    own = logits.gather(1, truth)
    classes = torch.arange(logits.shape[1], device=logits.device)
    # Not `>`: a score that is not a number counts as ahead of the truth, and never as correct.
    ahead = ~(logits <= own) | ((logits == own) & (classes < truth))
    return ahead.sum(1)


def _summed_loss(criterion: Criterion, logits: Tensor, labels: Tensor) -> Tensor:
    known = labels >= 0
    if not known.any():
        return logits.new_zeros(())
    rows = known.nonzero().squeeze(1)
    answers = labels[rows].to(logits.device, non_blocking=True)
    return criterion(logits[rows.to(logits.device, non_blocking=True)], answers) * len(rows)
