"""A data set of noise in the homework's layout: made quickly, to measure speed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

FRAMES, MELS = 300, 40


def make_noise(folder: Path, utterances: int, speakers: int = 10) -> None:
    """Write a data set of `utterances` matrices of FRAMES x MELS into a new folder."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    listed: dict[str, list[dict[str, Any]]] = {f"speaker-{n}": [] for n in range(speakers)}
    for number in range(utterances):
        mel = rng.standard_normal((FRAMES, MELS), np.float32)
        torch.save(torch.from_numpy(mel), folder / f"{number:06d}.pt")
        row = {"feature_path": f"{number:06d}.pt", "mel_len": FRAMES}
        listed[f"speaker-{number % speakers}"].append(row)
    (folder / "metadata.json").write_text(json.dumps({"n_mels": MELS, "speakers": listed}))
