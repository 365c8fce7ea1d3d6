"""Prediction by three models combined, against the three one after the other.

    python -m scripts.bench.combined [--utterances 200] [--out scripts/results/combined.json]

The models have random weights: a Conformer, a Transformer and a wider Conformer. The set is random
log-mels of many lengths, with a split val, on which the combination is fitted. In each round the
three models predict test one after the other, and then together, as `shardprep predict` does once
models and shards are open; every second round in the other order. The ratio is the median over the
rounds of the times of the same round; by the clock, and by the CPU time of all threads, which other
programs on the machine disturb less.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
import torch

import shardprep
from shardprep.bench.machine import machine
from shardprep_trainer.checkpoint.files import CheckpointFolder
from shardprep_trainer.checkpoint.state import Best, Checkpoint
from shardprep_trainer.config.fields import Config, ModelConfig
from shardprep_trainer.inference import ModelOptions, open_inference
from shardprep_trainer.model.build import build_model
from shardprep_trainer.predict import predict_names

N_MELS, SPEAKERS, VAL = 40, 100, 200
SHORTEST, LONGEST = 100, 500
MODELS = {
    "conformer": ModelConfig(dim=144, heads=4, head_dim=36, ff_dim=576, layers=2),
    "transformer": ModelConfig(
        encoder="transformer", dim=192, heads=4, head_dim=48, ff_dim=768, layers=3
    ),
    "wider": ModelConfig(dim=192, heads=4, head_dim=48, ff_dim=768, layers=2),
}


def write_set(folder: Path, count: int) -> Path:
    """A set of random log-mels: two utterances of each speaker to train on, and val and test."""
    rng = np.random.default_rng(0)
    names = [f"speaker-{number:03d}" for number in range(SPEAKERS)]
    with shardprep.ShardWriter(folder, N_MELS, workers=1) as writer:
        for split, own in (("train", 2 * SPEAKERS), ("val", VAL), ("test", count)):
            for number in range(own):
                frames = int(rng.integers(SHORTEST, LONGEST))
                mel = rng.standard_normal((frames, N_MELS)).astype(np.float16)
                writer.add(f"{split}-{number:05d}", mel, names[number % SPEAKERS], split)  # type: ignore[arg-type]
    return folder


def write_run(folder: Path, shards: Path, model: ModelConfig) -> Path:
    """A run folder with a model of random weights."""
    torch.manual_seed(0)
    opened = shardprep.open_shards(shards)
    config = Config(model=model)
    config = replace(config, data=replace(config.data, shards=str(shards)))
    network = build_model(model, N_MELS, SPEAKERS)
    CheckpointFolder(folder).save_best(
        Checkpoint(
            step=0,
            best=Best(),
            config=config,
            speakers=opened.speakers,
            n_mels=N_MELS,
            fingerprint=opened.manifest.fingerprint,
            weights=network.state_dict(),
        )
    )
    return folder


def predictor(runs: list[Path]) -> Callable[[], list[str]]:
    """A function that predicts test by some models, which are open already."""
    options = ModelOptions(runs, (), "test", "best", max_frames=32_768, tta=0, tta_frames=0)
    inference = open_inference(options, lambda text: None)
    part = inference.split("test")
    return lambda: predict_names(inference, part)


def timed(predict: Callable[[], list[str]]) -> tuple[float, float]:
    """Seconds of a prediction, by the clock and of the CPU."""
    began, cpu = time.perf_counter(), time.process_time()
    predict()
    return time.perf_counter() - began, time.process_time() - cpu


def one_round(
    alone: dict[str, Callable[[], list[str]]], combined: Callable[[], list[str]], *, turned: bool
) -> dict[str, tuple[float, float]]:
    """The times of each model alone and of all together."""
    order = [*alone.items(), ("combined", combined)]
    return {name: timed(predict) for name, predict in (order[::-1] if turned else order)}


def summary(rounds: list[dict[str, tuple[float, float]]]) -> dict[str, Any]:
    """Medians over the rounds: seconds of each, and the ratios of combined to alone."""
    seconds = {
        name: round(statistics.median(own[name][0] for own in rounds), 3) for name in rounds[0]
    }
    clock, cpu = (
        statistics.median(
            own["combined"][which] / sum(own[name][which] for name in MODELS) for own in rounds
        )
        for which in (0, 1)
    )
    return {"seconds": seconds, "ratio": round(clock, 4), "cpu_ratio": round(cpu, 4)}


@click.command(context_settings={"show_default": True})
@click.option("--utterances", "count", type=click.IntRange(1), default=200, help="Of test.")
@click.option("--rounds", type=click.IntRange(1), default=3)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="JSON to write.")
def main(count: int, rounds: int, out: Path | None) -> None:
    """Measure, and print the times and the ratio."""
    with tempfile.TemporaryDirectory() as work:
        shards = write_set(Path(work, "shards"), count)
        runs = [write_run(Path(work, name), shards, model) for name, model in MODELS.items()]
        alone = {name: predictor([run]) for name, run in zip(MODELS, runs, strict=True)}
        combined = predictor(runs)
        one_round(alone, combined, turned=False)
        found = summary([one_round(alone, combined, turned=bool(n % 2)) for n in range(rounds)])
    for name, seconds in found["seconds"].items():
        click.echo(f"{name:<12} {seconds:8.2f} s")
    click.echo(
        f"combined / the three alone: {found['ratio']:.3f}, by CPU time {found['cpu_ratio']:.3f}"
    )
    if out is not None:
        about = {"machine": msgspec.to_builtins(machine()), "utterances": count, "rounds": rounds}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({**about, **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
