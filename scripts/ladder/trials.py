"""The trials of speaker verification that all runs of a ladder share, and scores on them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np

from shardprep import publish
from shardprep_trainer.evaluation.trial_lists import read_trials
from shardprep_trainer.evaluation.trials import draw_trials, possible_trials
from shardprep_trainer.evaluation.verification import cosine_scores, judge

# The largest number of pairs of one speaker; there are as many pairs of two speakers.
TRIALS = 50_000


def write_trials(file: Path, dataset: Path, labels: Path, seed: int = 0) -> int:
    """Draw pairs of test utterances, half of them from one speaker, and write a VoxCeleb list.

    Args:
        file: The list to write; without such pairs, no file is written.
        dataset: Data set in the homework's layout.
        labels: CSV of true labels, Id,Category.
        seed: Decides which pairs are drawn.

    Returns:
        The number of trials.
    """
    test = json.loads((dataset / "testdata.json").read_text())["utterances"]
    with labels.open(newline="") as opened:
        _, *rows = csv.reader(opened)
    truth = {row[0]: row[1] for row in rows}
    keys = [Path(entry["feature_path"]).stem for entry in test if entry["feature_path"] in truth]
    numbers = {name: number for number, name in enumerate(sorted(set(truth.values())))}
    speakers = np.array([numbers[truth[f"{key}.pt"]] for key in keys], np.int64)
    count = min(TRIALS, *possible_trials(speakers))
    if not count:
        return 0
    trials = draw_trials(speakers, count, count, seed)
    lines = [
        f"{int(target)} {keys[one]} {keys[other]}\n"
        for one, other, target in zip(trials.enroll, trials.test, trials.target, strict=True)
    ]
    with publish(file) as out:
        out.write("".join(lines).encode())
    return len(trials)


def verify_embeddings(file: Path, trials: Path) -> dict[str, float]:
    """EER and minDCF of embeddings that `homework_baseline.py` wrote.

    Args:
        file: The embeddings (npz), `key` (N,) and `embedding` (N, D).
        trials: The list of trials.
    """
    with np.load(file) as kept:
        keys, embeddings = [str(key) for key in kept["key"]], kept["embedding"]
    pairs = read_trials(trials, keys)
    found = judge(cosine_scores(embeddings, pairs), pairs.target)
    return {"eer": found.eer, "min_dcf": found.min_dcf}
