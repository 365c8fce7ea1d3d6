"""Fixtures that every test may use: small data sets in the homework's layout, made from a seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

N_MELS = 40
DatasetFactory = Callable[..., Path]


def write_dataset(
    root: Path,
    *,
    speakers: int = 3,
    utterances: int = 8,
    test_utterances: int = 5,
    frames: tuple[int, int] = (20, 200),
    seed: int = 0,
) -> Path:
    """Write metadata.json, mapping.json, testdata.json and the `.pt` files they name.

    Each speaker has a mean spectrum of its own, so that a model can tell them apart; the frames
    around it are smooth in time. The truth about the test utterances goes into
    `root/../test_labels.csv`.
    """
    rng = np.random.default_rng(seed)
    root.mkdir(parents=True)
    names = [f"id{n:05d}" for n in range(speakers)]
    voices = rng.normal(-4.0, 3.0, (speakers, N_MELS))

    def utterance(speaker: int, number: str) -> dict[str, object]:
        length = int(rng.integers(frames[0], frames[1] + 1))
        noise = rng.normal(0.0, 1.0, (length, N_MELS)).cumsum(0) / np.sqrt(length)
        name = f"uttr-{hashlib.md5(number.encode()).hexdigest()}.pt"
        mel = (voices[speaker] + noise).astype(np.float32)
        torch.save(torch.from_numpy(mel), root / name)
        return {"feature_path": name, "mel_len": length}

    metadata = {
        name: [utterance(s, f"{seed}/{s}/{u}") for u in range(utterances)]
        for s, name in enumerate(names)
    }
    truth = [int(s) for s in rng.integers(0, speakers, test_utterances)]
    test = [utterance(s, f"{seed}/test/{u}") for u, s in enumerate(truth)]
    mapping = {
        "speaker2id": {name: s for s, name in enumerate(names)},
        "id2speaker": {str(s): name for s, name in enumerate(names)},
    }
    (root / "metadata.json").write_text(json.dumps({"n_mels": N_MELS, "speakers": metadata}))
    (root / "mapping.json").write_text(json.dumps(mapping))
    if test_utterances:
        (root / "testdata.json").write_text(json.dumps({"n_mels": N_MELS, "utterances": test}))
        rows = [f"{row['feature_path']},{names[s]}" for row, s in zip(test, truth, strict=True)]
        (root.parent / "test_labels.csv").write_text("\n".join(["Id,Category", *rows]) + "\n")
    return root


@pytest.fixture
def make_dataset(tmp_path: Path) -> DatasetFactory:
    """`make_dataset(**options) -> Path` of a fresh data set; see `write_dataset` for options."""

    def make(name: str = "Dataset", **options: object) -> Path:
        return write_dataset(tmp_path / name, **options)  # type: ignore[arg-type]

    return make
