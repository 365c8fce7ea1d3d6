"""Training and using a model with an encoder of one's own; and code that nobody asked for."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from click.testing import CliRunner
from saved_models import make_checkpoint

from shardprep_trainer import (
    SpeakerModel,
    check_encoder,
    compare,
    embed,
    export,
    identify,
    predict,
    score,
)
from shardprep_trainer.checkpoint.files import CheckpointFolder, load
from shardprep_trainer.checkpoint.weights import load_model
from shardprep_trainer.config.command_line import RECIPES, parse_args
from shardprep_trainer.config.fields import Config
from shardprep_trainer.errors import CheckpointError, ConfigError, EncoderError
from shardprep_trainer.run.start import prepare
from shardprep_trainer.run.trainer import Trainer
from shardprep_trainer.train import main as train_main

ConfigFactory = Callable[..., Config]
TDNN = "own_encoder:Tdnn"
OWN = {
    "model.encoder": TDNN,
    "model.encoder_options": "{width: 12, dilations: [1, 3]}",
    "train.total_steps": 4,
    "train.save_steps": 2,
    "train.valid_steps": 2,
}


def train(config: Config, *, resume: bool = False) -> None:
    trainer = Trainer(prepare(config, resume=resume))
    try:
        trainer.fit()
    finally:
        trainer.close()


def weights(config: Config) -> dict[str, torch.Tensor]:
    return load(max((config.run / "checkpoints").glob("step-*.pt"))).weights


def test_an_encoder_of_ones_own_trains_resumes_and_names_speakers(
    make_config: ConfigFactory, shards: Path, tmp_path: Path
) -> None:
    whole = make_config(name="whole", **OWN)
    train(whole)
    assert whole.model.encoder_options == {"width": 12, "dilations": [1, 3]}
    halves = make_config(name="halves", **{**OWN, "train.stop_step": 2})
    train(halves)
    train(make_config(name="halves", **OWN), resume=True)
    expected, found = weights(whole), weights(halves)
    assert expected["encoder.layers.1.weight"].shape == (12, 12, 3)
    assert all(torch.equal(found[name], value) for name, value in expected.items())

    out = tmp_path / "submission.csv"
    command = [str(whole.run), "--out", str(out)]
    refused = CliRunner().invoke(predict.main, command)
    assert refused.exit_code == 1
    assert f"its encoder is {TDNN}, code that does not come with shardprep" in refused.output
    assert f"--encoder {TDNN}" in refused.output
    assert not out.exists()
    done = CliRunner().invoke(predict.main, [*command, "--encoder", "other:E", "--encoder", TDNN])
    assert done.exit_code == 0, done.output
    assert len(out.read_text().splitlines()) == 6
    card = (whole.run / "model" / "README.md").read_text()
    assert f"Encoder `{TDNN}` (width 12, dilations  1, 3 )" in card
    assert f"shardprep compare MODEL a.wav b.wav --encoder {TDNN}" in card or "encoder=" in card


def test_the_encoder_of_the_documentation_keeps_the_contract() -> None:
    page = Path(__file__).parents[2] / "docs" / "training.md"
    section = page.read_text().split("## A model of your own\n")[1]
    names: dict[str, Any] = {}
    exec(section.split("```python\n")[1].split("```")[0], names)
    check_encoder(names["Mine"](40), 40)
    # The padding is zeros by the contract; with another value a convolution would see its end.
    names["Mine"].forward = lambda self, mel, mask: self.conv((mel + 1).transpose(1, 2)).mT
    with pytest.raises(EncoderError, match="padding counts"):
        check_encoder(names["Mine"](40), 40)


def test_options_of_an_encoder_can_be_given_one_by_one() -> None:
    found = parse_args(
        ["--model.encoder", TDNN, "--model.encoder_options.width", "7"]
        + ["--model.encoder_options.name", "a", "--model.encoder_options.shares=[.5, null]"]
    ).config.model
    assert found.encoder_options == {"width": 7, "name": "a", "shares": [0.5, None]}
    assert parse_args(["--config", str(RECIPES / "smoke.yaml")]).config.model.encoder_options == {}


def test_a_printed_configuration_with_an_encoder_is_read_back(tmp_path: Path) -> None:
    options = ["--model.encoder", TDNN, "--model.encoder_options", "{a: [[1, 2], [x]], b: 1e-3}"]
    config = parse_args(options).config
    (tmp_path / "mine.yaml").write_text(config.to_yaml())
    assert parse_args(["--config", str(tmp_path / "mine.yaml")]).config == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.encoder", "lstm"], "allowed is conformer, transformer, or package.module:Class"),
        (["--model.encoder", "a b:C"], "model.encoder: found 'a b:C'"),
        (["--model.encoder", "a:\x1b[2J"], r"model.encoder: found 'a:\\x1b\[2J'"),
        (["--model.encoder_options.width", "3"], "allowed is none for a conformer"),
        (["--model.encoder=a:B", "--model.encoder_options", "[1]"], "model.encoder_options"),
        (["--model.encoder=a:B", "--model.encoder_options.x", ".inf"], "finite numbers"),
        (["--model.encoder=a:B", "--model.encoder_options.x", "[[.nan]]"], "finite numbers"),
        (["--model.encoder=a:B", "--model.encoder_options.x", "{y: 1}"], "a mapping of names to"),
        (["--model.encoder=a:B", "--model.encoder_options", "{'a b': 1}"], "model.encoder_opt"),
    ],
)
def test_bad_names_and_options_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_args(options)


@pytest.fixture
def harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file that importing the module `harmful` makes."""
    folder, file = tmp_path / "modules", tmp_path / "harm"
    folder.mkdir()
    (folder / "harmful.py").write_text(
        f"open({str(file)!r}, 'w').close()\nfrom own_encoder import Tdnn as Encoder\n"
    )
    monkeypatch.syspath_prepend(folder)
    yield file
    sys.modules.pop("harmful", None)


def hostile(config: Config, **model: Any) -> Any:
    """A checkpoint that looks like any other, but for the encoder that it names."""
    named = {"encoder": "harmful:Encoder", **model}
    evil = dataclasses.replace(config, model=dataclasses.replace(config.model, **named))
    return msgspec.structs.replace(make_checkpoint(config, 5), config=evil)


@pytest.fixture
def run(make_config: ConfigFactory, tmp_path: Path) -> Path:
    folder = CheckpointFolder(tmp_path / "run")
    checkpoint = hostile(make_config())
    folder.save_best(checkpoint)
    folder.save(checkpoint)
    (tmp_path / "run" / "config.yaml").write_text(checkpoint.config.to_yaml())
    return tmp_path / "run"


def assert_untouched(harm: Path) -> None:
    assert not harm.exists()
    assert "harmful" not in sys.modules


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (predict.main, ["--out", "OUT"]),
        (score.main, []),
        (embed.main, ["--out", "OUT.npz"]),
        (embed.main, ["AUDIO", "--features-from", "homework", "--out", "OUT.npz"]),
        (export.main, ["--out", "OUT.pt"]),
        (compare.main, ["AUDIO", "AUDIO", "--features-from", "homework"]),
        (identify.main, ["AUDIO", "--features-from", "homework"]),
    ],
)
@pytest.mark.parametrize("choice", ["best", "last"])
def test_no_command_imports_what_a_checkpoint_names(
    command: Any, arguments: list[str], choice: str, run: Path, harm: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    places = {"AUDIO": str(tmp_path / "a.wav"), "OUT": str(tmp_path / "out")}
    given = [places.get(word, word.replace("OUT", places["OUT"])) for word in arguments]
    options = [str(run), *given, "--checkpoint", choice]
    for more in ([], ["--encoder", "own_encoder:Tdnn"], ["--encoder", "harmful"]):
        found = CliRunner().invoke(command, [*options, *more])
        assert found.exit_code == 1, found.output
        assert "its encoder is harmful:Encoder, code that does not come with" in found.output
        assert_untouched(harm)
    CliRunner().invoke(command, [*options, "--encoder", "harmful:Encoder"])
    assert harm.exists()


def test_a_model_is_opened_in_python_only_with_the_name_of_its_encoder(
    run: Path, harm: Path
) -> None:
    for place in (run, run / "model", run / "model" / "model.safetensors"):
        with pytest.raises(CheckpointError, match='encoder="harmful:Encoder" in Python'):
            SpeakerModel.from_pretrained(place)
    assert_untouched(harm)
    # Imported then, and refused for another reason: the weights are those of a Conformer.
    with pytest.raises(CheckpointError, match="weights in it do not fit its model"):
        SpeakerModel.from_pretrained(run, encoder="harmful:Encoder")
    assert harm.exists()


@pytest.mark.parametrize("where", ["run", "run/config.yaml", "run/model", "run/model/config.yaml"])
@pytest.mark.parametrize("resume", [True, False])
def test_training_imports_no_code_that_a_run_names(
    where: str,
    resume: bool,
    run: Path,
    harm: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["--config", str(tmp_path / where), *(["--resume"] if resume else [])]
    for options in (given, [*given, "--config", str(RECIPES / "smoke.yaml"), *given]):
        assert train_main([*options, "--model.encoder_options.width=12"]) == 2
        told = capsys.readouterr().err
        assert "harmful:Encoder is code that does not come with shardprep" in told
        assert "name it yourself: --model.encoder harmful:Encoder" in told
    assert_untouched(harm)
    named = parse_args([*given, "--model.encoder", "harmful:Encoder"])
    assert named.config.model.encoder == "harmful:Encoder"


def test_fine_tuning_imports_no_code_that_its_model_names(
    make_config: ConfigFactory, run: Path, harm: Path
) -> None:
    for place in (run, run / "model"):
        config = make_config(name=place.name, **{"train.start_from": place})
        with pytest.raises(CheckpointError, match="--config"):
            prepare(make_config(**{"train.start_from": place, "model.layers": 2}))
        trainer = Trainer(prepare(config))
        trainer.close()
        assert_untouched(harm)


@pytest.mark.parametrize(
    "name",
    ["os:system", "shardprep_trainer.train:command", "shardprep_trainer.model.trunk:BasicBlock"]
    + ["harmful:Encoder", "harmful.inner:Encoder"],
)
def test_no_name_in_a_checkpoint_is_imported(
    name: str, make_config: ConfigFactory, harm: Path
) -> None:
    with pytest.raises(CheckpointError, match="nothing was imported"):
        load_model(hostile(make_config(), encoder=name))
    assert_untouched(harm)


def test_options_that_name_a_class_are_never_imported(harm: Path, tmp_path: Path) -> None:
    """The parser of the command line imports a `class_path` in values of any type."""
    (tmp_path / "evil.yaml").write_text(
        "model:\n  encoder: own_encoder:Tdnn\n"
        "  encoder_options: {width: {class_path: harmful.Encoder, init_args: {n_mels: 40}}}\n"
    )
    with pytest.raises(ConfigError, match=r"model.encoder_options"):
        parse_args(["--config", str(tmp_path / "evil.yaml")])
    found = parse_args(["--model.encoder=a:B", "--model.encoder_options.x", "harmful.Encoder"])
    assert found.config.model.encoder_options == {"x": "harmful.Encoder"}
    assert_untouched(harm)


def test_a_huge_stack_in_a_checkpoint_takes_no_memory(make_config: ConfigFactory) -> None:
    evil = hostile(
        make_config(),
        encoder="shardprep_trainer.model.trunk:ResNet",
        encoder_options={"blocks": [10**9, 1, 1, 1]},
    )
    with pytest.raises(CheckpointError, match="ask for more layers than"):
        load_model(evil)
    wide = {"channels": [2**40] * 4}
    evil = hostile(
        make_config(), encoder="shardprep_trainer.model.trunk:ResNet", encoder_options=wide
    )
    with pytest.raises(CheckpointError, match="do not fit its model|cannot be built"):
        load_model(evil)
