"""What fills a segment of a shorter utterance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardprep_trainer.config.fields import Config
from shardprep_trainer.errors import ConfigError
from shardprep_trainer.learning.losses import SoftmaxLoss
from shardprep_trainer.learning.objective import Objective, repeat_frames
from shardprep_trainer.run.start import prepare
from shardprep_trainer.run.trainer import Trainer

LENGTHS = (7, 3, 1, 6)


class Seen(nn.Module):
    """Keeps what it is given, and passes it on as a model or as an augmentation does."""

    def __init__(self, scores: bool) -> None:
        super().__init__()
        self.scores = scores
        self.given: list[tuple[Tensor, Tensor | None]] = []

    def forward(self, mel: Tensor, lengths: Tensor | None) -> Tensor:
        self.given.append((mel.clone(), lengths))
        return mel.mean(1)[:, :5].requires_grad_() if self.scores else mel


def segments() -> tuple[Tensor, Tensor]:
    mel = torch.randn(len(LENGTHS), 7, 6, generator=torch.Generator().manual_seed(0))
    for row, length in zip(mel, LENGTHS, strict=True):
        row[length:] = torch.nan
    return mel, torch.tensor(LENGTHS)


def test_a_short_segment_is_its_frames_again_from_the_beginning() -> None:
    mel, lengths = segments()
    found = repeat_frames(mel, lengths)
    for row, out, length in zip(mel, found, LENGTHS, strict=True):
        assert torch.equal(out, torch.cat([row[:length]] * 7)[:7])


@pytest.mark.parametrize("repeat", [True, False])
def test_a_model_gets_lengths_only_of_what_is_padded(repeat: bool) -> None:
    mel, lengths = segments()
    model, augment = Seen(scores=True), Seen(scores=False)
    objective = Objective(model, SoftmaxLoss(), augment, repeat=repeat)
    objective(mel, lengths, torch.zeros(len(mel), dtype=torch.long))
    for ((given, valid),) in (model.given, augment.given):
        expected = repeat_frames(mel, lengths) if repeat else mel
        assert torch.equal(given.nan_to_num(1e9), expected.nan_to_num(1e9))
        assert (valid is None) is repeat


def test_repeating_is_one_graph_for_all_lengths() -> None:
    mel, lengths = segments()
    compiled = torch.compile(repeat_frames, backend="eager", fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for valid in (lengths, lengths.flip(0), torch.full_like(lengths, 7)):
            found, expected = compiled(mel, valid), repeat_frames(mel, valid)
            assert torch.equal(found.nan_to_num(1e9), expected.nan_to_num(1e9))


def test_training_on_repeated_segments_has_no_mask_and_resumes_only_as_such(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some utterances of the set are shorter than this.
    options: dict[str, Any] = {"data.segment_frames": 90, "train.total_steps": 4}
    given: list[bool] = []
    for short in ("pad", "repeat"):
        once = {**options, "data.short": short, "name": short, "train.stop_step": 2}
        trainer = Trainer(prepare(make_config(**once)))
        model = trainer.train_step.bare
        model.register_forward_pre_hook(lambda module, args: given.append(args[1] is not None))
        trainer.fit()
        trainer.close()
        assert any(given) == (short == "pad")
        given.clear()
    with pytest.raises(ConfigError, match=r"data.short: found pad, but the run .* with repeat"):
        prepare(make_config(**{**options, "name": "repeat"}), resume=True)
