"""The model card says what the run knows, and nothing that it does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from saved_models import make_checkpoint

from shardprep import FeatureRecipe
from shardprep_trainer.checkpoint.card import card
from shardprep_trainer.checkpoint.model_folder import write_model
from shardprep_trainer.checkpoint.state import Results, TrainedOn
from shardprep_trainer.config.fields import Config
from shardprep_trainer.config.scoring import Thresholds

ConfigFactory = Callable[..., Config]
RESULTS = Results(
    utterances=20, accuracy=0.95, trials=760, eer=0.125, min_dcf=0.5, new_speakers=True
)


def test_a_card_has_data_recipe_results_and_limits(
    make_config: ConfigFactory, tmp_path: Path
) -> None:
    recipe = FeatureRecipe(hop_length=200, n_mels=24)
    checkpoint = make_checkpoint(
        make_config(),
        5,
        features=recipe.to_features(),
        trained_on=TrainedOn(utterances=1200, frames=576_000),
        results=RESULTS,
        thresholds=Thresholds(eer=0.41, min_dcf=0.62),
    )
    write_model(tmp_path, checkpoint)
    text = (tmp_path / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "shardprep"
    # 576,000 frames of 12.5 ms.
    assert "3 speakers, 1,200 utterances, 2.00 hours" in body
    for words in (
        "| n_mels | 24 |",
        "| rounded to | float16 |",
        "| accuracy over 20 utterances | 0.9500 |",
        "760 trials of speakers whom training did not know | 12.50 % |",
        "| cosine at the equal error rate | 0.4100 |",
        "shardprep compare MODEL a.wav b.wav",
        "under which licence, the run does not know",
        "no proof of identity",
        "Conformer with 1 block of width 32,",
        f"in the run {checkpoint.config.name}, to step 5 of ",
    ):
        assert words in body
    weights = sum(weight.numel() for weight in checkpoint.weights.values())
    assert f"{weights:,} weights" in body


def test_what_is_unknown_is_said(make_config: ConfigFactory) -> None:
    text = card(make_checkpoint(make_config(), 5), 1)
    assert "takes log-mels and no recordings" in text
    assert "The model was not validated." in text
    assert "shardprep compare" not in text


@pytest.mark.parametrize("name", ["<script>x</script>", "[a](http://b)", "a\n# b", "`x`", "---"])
def test_no_name_is_markup(make_config: ConfigFactory, name: str) -> None:
    checkpoint = make_checkpoint(
        make_config(), 5, fingerprint=name, features={name: name, "kind": "x"}
    )
    body = card(checkpoint, 1).split("---\n", 2)[2]
    assert name not in body or name == "---"
    assert not any(line in ("# b", "---") for line in body.splitlines())
