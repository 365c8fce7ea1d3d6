"""What a model gets of a batch."""

from __future__ import annotations

import torch

from shardprep_trainer.model.build import model_inputs

CPU = torch.device("cpu")


def test_lengths_are_given_only_where_something_is_padded() -> None:
    mel = torch.zeros(2, 5, 3, dtype=torch.float16)
    full, none = model_inputs({"mel": mel, "length": torch.tensor([5, 5])}, CPU)
    assert none is None
    assert full.dtype == torch.float32
    _, lengths = model_inputs({"mel": mel, "length": torch.tensor([5, 4])}, CPU)
    assert lengths is not None
    assert lengths.tolist() == [5, 4]
