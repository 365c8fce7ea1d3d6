"""The true speakers of a split, by its own labels or by a CSV."""

from __future__ import annotations

from pathlib import Path

from shardprep import Split
from shardprep_trainer.errors import PredictionError
from shardprep_trainer.evaluation.labels import missing_rows, read_labels
from shardprep_trainer.evaluation.names import SEVERAL, Names
from shardprep_trainer.evaluation.trial_lists import ambiguous
from shardprep_trainer.pretrained.on_shards import Inference


def true_names(inference: Inference, part: Split, labels: Path | None) -> list[str | None]:
    """Speaker of each utterance (N,), None where unknown.

    Args:
        inference: What is scored.
        part: The split; its own labels count where `labels` is None.
        labels: A CSV, Id,Category; utterances that it does not list are unknown.

    Raises:
        PredictionError: The CSV is not one, lists an utterance that the split lacks, or a key that
            several utterances have.
    """
    if labels is None:
        names = inference.shards.speakers
        return [names[label] if label >= 0 else None for label in part.labels]
    rows = read_labels(labels)
    positions = Names(part.keys).find(rows)
    if missing := [key for key in rows if key not in positions]:
        where = f"split {part.name} of {inference.shards.where}"
        raise missing_rows(where, missing, labels, len(rows), inference.left_out)
    found: list[str | None] = [None] * len(part)
    for key, name in rows.items():
        if positions[key] == SEVERAL:
            raise ambiguous(key, str(labels))
        if found[positions[key]] is not None:
            raise PredictionError(f"{labels}: {key} occurs twice; leave one row for each utterance")
        found[positions[key]] = name
    return found
