"""A run that was trained on recordings, and the recordings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile
from saved_models import make_checkpoint
from spoken import LONGEST, voice

import shardprep
from shardprep_trainer.checkpoint.files import CheckpointFolder
from shardprep_trainer.config.scoring import Calibration, Thresholds


@pytest.fixture
def audio(tmp_path: Path) -> Path:
    """Three speakers with recordings of .2 s to 8 s, of several rates and kinds."""
    folder = tmp_path / "audio"
    for number, seconds in enumerate((0.2, 0.5, 1.0, 2.5, 8.0, 2.0)):
        rate, kind = ((16_000, "wav"), (8_000, "flac"), (44_100, "wav"))[number % 3]
        place = folder / f"s{number % 3}" / f"{number}.{kind}"
        place.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(place, voice(seconds, number, rate), rate)
    return folder


@pytest.fixture
def dtype() -> str:
    """Element type of the shards; a test may parametrise it."""
    return "float16"


@pytest.fixture
def shards(audio: Path, tmp_path: Path, dtype: Any) -> Path:
    """The recordings as a set; all are in the split train."""
    options = shardprep.BuildOptions(dtype=dtype, val_fraction=0, workers=1)
    shardprep.build_shards(audio, tmp_path / "shards", options)
    return tmp_path / "shards"


@pytest.fixture
def make_run(make_config: Callable[..., Any], shards: Path, tmp_path: Path) -> Callable[..., Path]:
    """`make_run(**entries)`: a run of random weights, with the recipe of the recordings."""

    def make(**changes: Any) -> Path:
        shard_set = shardprep.open_shards(shards)
        entries = {
            "speakers": shard_set.speakers,
            "features": shard_set.features,
            "dtype": shard_set.dtype,
            "longest_frames": LONGEST,
            "thresholds": Thresholds(eer=0.25, min_dcf=0.5),
            "calibration": Calibration(scale=8.0, offset=-2.0),
            **changes,
        }
        CheckpointFolder(tmp_path / "run").save_best(make_checkpoint(make_config(), 5, **entries))
        return tmp_path / "run"

    return make


@pytest.fixture
def run(make_run: Callable[..., Path]) -> Path:
    """A run with the recipe of the recordings."""
    return make_run()
