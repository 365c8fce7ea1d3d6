"""Views of an utterance: where the segments lie, and that no segments change nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shardprep_trainer.config.fields import ModelConfig
from shardprep_trainer.evaluation.views import Views
from shardprep_trainer.model.build import build_model
from shardprep_trainer.model.model import SpeakerNetwork


@pytest.fixture(params=["linear", "cosine"])
def model(request: pytest.FixtureRequest) -> SpeakerNetwork:
    torch.manual_seed(0)
    sizes = {"dim": 16, "heads": 2, "head_dim": 8, "ff_dim": 32, "kernel_size": 7}
    return build_model(ModelConfig(classifier=request.param, **sizes), 5, 4).eval()


def one_by_one(
    model: SpeakerNetwork, mel: Tensor, starts: list[int], width: int
) -> tuple[Tensor, Tensor]:
    """The oracle: one utterance (T, F), each of its views by itself."""
    views = [mel, *(mel[start : start + width] for start in starts)]
    embeddings = [model.embed(view[None])[0] for view in views]
    scores = [model(view[None])[0] for view in views]
    return (
        torch.stack([F.normalize(one, dim=0) for one in embeddings]).mean(0),
        torch.stack(scores).mean(0),
    )


@pytest.mark.parametrize(
    ("segments", "starts"),
    [(1, [[15], [0], [3]]), (2, [[0, 30], [0, 0], [0, 7]]), (4, [[0, 10, 20, 30], [0] * 4, None])],
)
@torch.no_grad()
def test_views_are_the_whole_and_segments_from_end_to_end(
    model: SpeakerNetwork, segments: int, starts: list[list[int] | None]
) -> None:
    mel, lengths = torch.randn(3, 50, 5), torch.tensor([50, 12, 27])
    embedding, scores = Views(model, segments, 20).embed_and_score(mel, lengths)
    for row, length in enumerate(lengths.tolist()):
        where = starts[row]
        if where is None:
            where = [0, 7 // 3, 14 // 3, 7]
        wanted, wanted_scores = one_by_one(model, mel[row, :length], where, 20)
        assert torch.allclose(embedding[row], wanted, atol=1e-5)
        assert torch.allclose(scores[row], wanted_scores, atol=1e-5)


@torch.no_grad()
def test_no_segments_are_the_model_itself(model: SpeakerNetwork) -> None:
    mel, lengths = torch.randn(2, 30, 5), torch.tensor([30, 12])
    embedding, scores = Views(model).embed_and_score(mel, lengths)
    assert torch.equal(embedding, model.embed(mel, lengths))
    assert torch.equal(scores, model(mel, lengths))
    assert torch.equal(Views(model)(mel, lengths), scores)


@torch.no_grad()
def test_lengths_that_say_nothing_may_be_left_out(model: SpeakerNetwork) -> None:
    mel, views = torch.randn(2, 30, 5), Views(model, 3, 20)
    for one, other in zip(
        views.embed_and_score(mel), views.embed_and_score(mel, torch.tensor([30, 30])), strict=True
    ):
        assert torch.allclose(one, other, atol=1e-6)


@torch.no_grad()
def test_an_utterance_no_longer_than_a_segment_keeps_its_direction(model: SpeakerNetwork) -> None:
    mel = torch.randn(2, 20, 5)
    embedding, scores = Views(model, 5, 20).embed_and_score(mel)
    assert torch.allclose(embedding, F.normalize(model.embed(mel), dim=1), atol=1e-6)
    assert torch.allclose(scores, model(mel), atol=1e-5)


@pytest.mark.parametrize(("segments", "frames"), [(-1, 20), (1, 0)])
def test_views_that_cannot_be_are_refused(
    model: SpeakerNetwork, segments: int, frames: int
) -> None:
    with pytest.raises(ValueError, match="segments of"):
        Views(model, segments, frames)
