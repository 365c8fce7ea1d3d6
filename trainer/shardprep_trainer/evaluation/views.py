"""Embed whole utterances and segments of them, and take the mean (test-time augmentation).

Axis legend: B batch, T frames, F mel bins, D embedding width, S speakers, W frames of a segment.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardprep_trainer.config.fields import LONGEST_FRAMES
from shardprep_trainer.evaluation.pieces import in_pieces
from shardprep_trainer.model.model import SpeakerNetwork


class Views(nn.Module):
    """A speaker model that is shown several views of every utterance.

    The views are the whole utterance and `segments` segments of `frames` frames, equidistant from
    its first to its last frame; one segment is cut from the middle. An utterance that is not longer
    than a segment is every one of its segments. The embedding is the mean of the views' embeddings,
    each brought to length 1 before; the scores are the mean of the views' logits or cosines.
    Without segments both are those of the model itself, unchanged. A view that is too long for the
    model is cut, see `pieces`.

    Args:
        model: The model.
        segments: Segments of each utterance, 0 or more.
        frames: Length W of a segment [frames].
        longest: Most frames that the model is given at a time.

    Raises:
        ValueError: A negative number of segments, or segments of no frame.
    """

    def __init__(
        self,
        model: SpeakerNetwork,
        segments: int = 0,
        frames: int = 1,
        longest: int = LONGEST_FRAMES,
    ) -> None:
        super().__init__()
        if segments < 0 or frames < 1:
            raise ValueError(f"{segments} segments of {frames} frames: pass 0 or more of 1 or more")
        self.model = model
        self.segments = segments
        self.frames = frames
        self.longest = longest

    def embed_and_score(self, mel: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embed utterances and score them against every speaker.

        Args:
            mel: (B, T, F) log-mels, see `SpeakerNetwork.embed`.
            lengths: (B,) valid frames, or None for all T.

        Returns:
            Embeddings (B, D) and logits or cosines (B, S).
        """
        embedding, scores = in_pieces(self._one, mel, lengths, self.longest)
        if not self.segments:
            return embedding, scores
        embedding = F.normalize(embedding, dim=1)
        for segment, valid in self._cut(mel, lengths):
            other, other_scores = in_pieces(self._one, segment, valid, self.longest)
            embedding = embedding + F.normalize(other, dim=1)
            scores = scores + other_scores
        return embedding / (self.segments + 1), scores / (self.segments + 1)

    def forward(self, mel: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits or cosines (B, S) of mel (B, T, F); see `embed_and_score`."""
        return self.embed_and_score(mel, lengths)[1]

    def _one(self, mel: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        embedding = self.model.embed(mel, lengths)
        return embedding, self.model.classifier(embedding).to(embedding.dtype)

    def _cut(self, mel: Tensor, lengths: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The segments (B, W, F) and their valid frames, one after the other, in no more memory."""
        batch, total, _ = mel.shape
        width = min(self.frames, total)
        ends = torch.full((batch,), total, device=mel.device) if lengths is None else lengths
        room = (ends.to(mel.device) - width).clamp(min=0)
        valid = None if lengths is None else lengths.clamp(max=width)
        rows = torch.arange(batch, device=mel.device).unsqueeze(1)
        within = torch.arange(width, device=mel.device)
        for number in range(self.segments):
            gaps = self.segments - 1
            starts = room * number // gaps if gaps else room // 2
            yield mel[rows, starts.unsqueeze(1) + within], valid
