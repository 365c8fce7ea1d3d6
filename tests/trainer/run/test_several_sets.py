"""A run on several sets: one model of all their speakers, mixed as asked, resumed exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from saved_models import BEST

import shardprep
from shardprep_trainer import embed, predict, score
from shardprep_trainer.checkpoint.files import load
from shardprep_trainer.config.command_line import parse_args
from shardprep_trainer.config.fields import Config
from shardprep_trainer.errors import ConfigError
from shardprep_trainer.run.data import build_train_loader, open_data
from shardprep_trainer.run.start import prepare
from shardprep_trainer.run.trainer import Trainer

ConfigFactory = Callable[..., Config]


@pytest.fixture
def both(shards: Path, make_dataset: Callable[..., Path], tmp_path: Path) -> list[Path]:
    """`shards`, and a set that adds a speaker, 20 utterances to train on and 3 to name."""
    source = make_dataset("Second", speakers=4, utterances=6, test_utterances=3, seed=1)
    options = shardprep.BuildOptions(val_fraction=0.2, workers=1)
    shardprep.build_shards(source, tmp_path / "second", options)
    return [shards, tmp_path / "second"]


@pytest.fixture
def joined_config(both: list[Path], make_config: ConfigFactory) -> ConfigFactory:
    def make(**changes: Any) -> Config:
        text = f"[{', '.join(map(str, both))}]"
        return make_config(**{"data.shards": text, "data.shares": "[1, 2]", **changes})

    return make


def fit(config: Config, *, resume: bool = False) -> None:
    trainer = Trainer(prepare(config, resume=resume))
    try:
        trainer.fit()
    finally:
        trainer.close()


def losses(config: Config) -> list[float]:
    lines = map(json.loads, (config.run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["event"] == "train"]


def weights(config: Config) -> dict[str, torch.Tensor]:
    return load(config.run / "checkpoints" / "step-00000012.pt").weights


def test_a_resumed_mixture_equals_one_that_was_not_interrupted(
    joined_config: ConfigFactory, both: list[Path]
) -> None:
    options = {"data.balance": "speaker"}
    whole, parts = joined_config(name="whole", **options), joined_config(name="parts", **options)
    fit(whole)
    fit(joined_config(name="parts", **options, **{"train.stop_step": 7}))
    fit(parts, resume=True)
    assert losses(parts) == losses(whole)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(parts)[name])
    saved = load(whole.run / BEST)
    assert saved.speakers == shardprep.open_shards(both).speakers
    assert parse_args(["--config", str(whole.run / "config.yaml")]).config == whole
    assert saved.config == whole


def test_a_resumed_run_may_not_change_its_mixture(
    joined_config: ConfigFactory, make_config: ConfigFactory, both: list[Path]
) -> None:
    fit(joined_config(**{"train.stop_step": 2}))
    for changes, what in [
        (
            {"data.shares": "[2, 1]"},
            r"data\.shares: found \[2\.0, 1\.0\].*began with \[1\.0, 2\.0\]",
        ),
        ({"data.shares": "null"}, r"data\.shares: found None"),
        ({"data.balance": "speaker"}, r"data\.balance: found speaker.*began with None"),
        ({"data.shards": f"[{both[1]}, {both[0]}]"}, r"data\.shards: .*has fingerprint"),
        ({"data.shards": both[0], "data.shares": "null"}, r"data\.shards: .*has fingerprint"),
    ]:
        with pytest.raises(ConfigError, match=what):
            fit(joined_config(**changes), resume=True)


def test_the_commands_take_the_runs_sets_several_others_or_one(
    joined_config: ConfigFactory, both: list[Path], tmp_path: Path
) -> None:
    config = joined_config(**{"train.total_steps": 2, "train.valid_steps": 2})
    fit(config)
    out, again = tmp_path / "out.csv", [x for place in both for x in ("--shards", str(place))]

    def rows(*options: str) -> list[str]:
        result = CliRunner().invoke(predict.main, [str(config.run), *options, "--out", str(out)])
        assert result.exit_code == 0, result.output
        return out.read_text().splitlines()[1:]

    alone = [rows("--shards", str(place)) for place in both]
    assert rows() == rows(*again) == alone[0] + alone[1]
    assert [len(one) for one in alone] == [5, 3]

    result = CliRunner().invoke(
        score.main, [str(config.run), "--backend", "wccn", "--json", *again], catch_exceptions=False
    )
    found = json.loads(result.stdout)
    joined = shardprep.open_shards(both)
    assert found["utterances"] == found["labelled"] == joined.samples["val"]
    assert found["unknown_to_model"] == 0
    assert found["shards"] == f"{both[0]} and {both[1]}"

    file = tmp_path / "embeddings.npz"
    CliRunner().invoke(embed.main, [str(config.run), "--out", str(file)], catch_exceptions=False)
    with np.load(file) as arrays:
        assert arrays["speakers"].tolist() == list(joined.speakers)
        assert arrays["keys"].tolist() == joined["val"].keys.tolist()
        assert str(arrays["fingerprint"]) == joined.fingerprint


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"data.shares": "[1]"}, r"data\.shares: found \[1\.0\], allowed is a share for each .* 2"),
        ({"data.shares": "[1, 0]"}, r"data\.shares\S*: found .*allowed is more than 0"),
        ({"data.shares": "often"}, r"data\.shares: found often, .*a list in brackets, such as"),
        ({"data.balance": "speakers"}, r"data\.balance: found speakers.*speaker"),
        ({"data.order": "windowed"}, r"data\.order: found windowed, allowed is global with"),
        ({"data.shards": "[]", "data.shares": "null"}, r"data\.shards: found \[\], allowed is the"),
    ],
)
def test_what_does_not_go_together_is_refused_before_any_work(
    joined_config: ConfigFactory, changes: dict[str, str], what: str
) -> None:
    with pytest.raises(ConfigError, match=what):
        joined_config(**changes)


def test_shards_that_cannot_be_mixed_are_refused_by_name(
    joined_config: ConfigFactory, both: list[Path], tmp_path: Path
) -> None:
    config = joined_config(**{"data.shares": "[99999, 2]"})
    with pytest.raises(ConfigError, match=r"data\.shares, data\.balance: .*take rounder ones"):
        build_train_loader(
            config, open_data(config.data, validated=True), 0, 1, torch.device("cpu")
        )
    absent = tmp_path / "absent"
    with pytest.raises(ConfigError, match=f"there is no folder {absent}"):
        open_data(joined_config(**{"data.shards": f"[{both[0]}, {absent}]"}).data, validated=True)
    with pytest.raises(shardprep.FormatError, match="is the same set as"):
        open_data(joined_config(**{"data.shards": f"[{both[0]}, {both[0]}]"}).data, validated=True)
