"""The rule of cutting: few and equal pieces, and the mean of what the model makes of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shardprep_trainer.config.fields import ModelConfig
from shardprep_trainer.evaluation import accuracy
from shardprep_trainer.evaluation.accuracy import evaluate
from shardprep_trainer.evaluation.pieces import cut, in_pieces
from shardprep_trainer.evaluation.views import Views
from shardprep_trainer.model.build import build_model
from shardprep_trainer.model.model import SpeakerNetwork


@given(st.integers(1, 10_000), st.integers(1, 300))
def test_pieces_are_few_equal_and_together_the_whole(frames: int, longest: int) -> None:
    pieces = cut(frames, longest)
    assert [frame for first, end in pieces for frame in range(first, end)] == list(range(frames))
    lengths = [end - first for first, end in pieces]
    assert max(lengths) - min(lengths) <= 1
    # One piece fewer would not do.
    assert (len(pieces) - 1) * longest < frames <= len(pieces) * longest
    assert max(lengths) <= longest


def network() -> SpeakerNetwork:
    torch.manual_seed(0)
    config = ModelConfig(
        dim=16, layers=1, heads=2, head_dim=8, ff_dim=32, kernel_size=3, center=True
    )
    return build_model(config, 4, 3).eval()


def by_hand(model: SpeakerNetwork, mel: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """The embedding and the scores of one utterance (T, F), as the documentation says it."""
    if len(mel) <= longest:
        return model.embed(mel[None])[0], model(mel[None])[0]
    count = int(np.ceil(len(mel) / longest))
    pieces = [mel[len(mel) * n // count : len(mel) * (n + 1) // count] for n in range(count)]
    embedding, scores = torch.zeros(16, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for piece in pieces:
        own = model.embed(piece[None])[0].double()
        embedding += len(piece) * own / own.norm()
        scores += len(piece) * model(piece[None])[0].double()
    return (embedding / len(mel)).float(), (scores / len(mel)).float()


LENGTHS = (23, 10, 20, 1, 11, 22)


def utterances() -> tuple[list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mels = [torch.randn(length, 4, generator=generator) for length in LENGTHS]
    batch = torch.full((len(mels), max(LENGTHS)), torch.nan)[..., None].repeat(1, 1, 4)
    for row, mel in zip(batch, mels, strict=True):
        row[: len(mel)] = mel
    return mels, batch, torch.tensor(LENGTHS)


@torch.inference_mode()
def test_only_what_is_too_long_is_cut() -> None:
    model = network()
    mels, batch, lengths = utterances()
    embeddings, scores = Views(model, longest=10).embed_and_score(batch, lengths)
    for mel, embedding, score in zip(mels, embeddings, scores, strict=True):
        expected, expected_score = by_hand(model, mel, 10)
        assert torch.allclose(embedding, expected, atol=1e-5)
        assert torch.allclose(score, expected_score, atol=1e-5)
    # Pieces make a difference, so that the test above can fail.
    whole = Views(model).embed_and_score(batch, lengths)[0]
    assert not torch.allclose(whole[0], embeddings[0], atol=1e-3)
    assert torch.allclose(whole[1], embeddings[1], atol=1e-5)


def test_a_batch_of_short_utterances_is_given_to_the_model_as_it_is() -> None:
    calls = []

    def run(mel: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        calls.append((mel, lengths))
        return mel[:, 0], mel[:, 0]

    mel, lengths = torch.zeros(3, 10, 4), torch.tensor([10, 9, 2])
    in_pieces(run, mel, lengths, 10)
    assert calls[0][0] is mel
    assert calls[0][1] is lengths
    assert len(calls) == 1


@torch.inference_mode()
def test_validation_cuts_by_the_same_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "LONGEST_FRAMES", 10)
    model = network()
    mels, batch, lengths = utterances()
    expected = [by_hand(model, mel, 10) for mel in mels]
    index = torch.arange(len(mels))
    keep = np.array([4, 0, 1])
    found = evaluate(
        model,
        [{"mel": batch, "length": lengths, "index": index}],
        np.zeros(len(mels), np.int64),
        device=torch.device("cpu"),
        keep=keep,
    )
    assert found.predictions.tolist() == [int(scores.argmax()) for _, scores in expected]
    assert found.embeddings is not None
    for row, number in zip(found.embeddings, keep, strict=True):
        assert np.allclose(row, expected[number][0].numpy(), atol=1e-5)
