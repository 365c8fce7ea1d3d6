"""Configuration: typed, documented, checked before any work, and faithful through YAML."""

from __future__ import annotations

import dataclasses
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import yaml

from shardprep_trainer.config.checks import parse_config
from shardprep_trainer.config.command_line import RECIPES, parse_args
from shardprep_trainer.config.encoders import SHIPPED
from shardprep_trainer.config.fields import PARTS, Config, flatten
from shardprep_trainer.errors import ConfigError

SOFTMAX = ["--loss.name=softmax", "--loss.margin=null", "--loss.scale=null"]


def test_without_arguments_the_boss_recipe_is_read_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = parse_args([])
    assert asked.config == parse_args(["--config", str(RECIPES / "boss.yaml")]).config
    assert (asked.resume, asked.print_config) == (False, False)
    assert asked.config.name == "boss"
    assert asked.config.data.shards == "shards/"
    assert asked.config.run == Path("runs/boss")


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("simple", ("transformer", 80, 1, 2, "mean", "mlp", "softmax")),
        ("medium", ("transformer", 160, 2, 8, "mean", "linear", "softmax")),
        ("strong", ("conformer", 512, 1, 8, "mean", "linear", "softmax")),
        ("boss", ("conformer", 512, 1, 8, "self_attentive", "cosine", "am_softmax")),
    ],
)
def test_recipes_are_the_models_of_the_homework(recipe: str, expected: tuple[object, ...]) -> None:
    config = parse_args(["--config", str(RECIPES / f"{recipe}.yaml")]).config
    m = config.model
    found = (m.encoder, m.dim, m.layers, m.heads, m.pooling, m.classifier, config.loss.name)
    assert found == expected
    assert config.name == recipe
    assert (config.optim.lr, config.optim.warmup_steps) == (1e-3, 1000)
    assert 70_000 <= config.train.total_steps <= 100_000
    assert (config.data.segment_frames, config.train.valid_steps) == (128, 2000)


@pytest.mark.parametrize("name", ["best", "smoke"])
def test_a_recipe_is_known_by_name_from_anywhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = parse_args(["--config", str(RECIPES / f"{name}.yaml")]).config
    # What lies in the current folder does not change what a name means.
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse_args(["--config", name]).config == expected
    changed = parse_args([f"--config={name}", "--optim.lr", "0.5"]).config
    assert (changed.name, changed.optim.lr) == (expected.name, 0.5)
    (tmp_path / "mine").write_text("name: mine")
    assert parse_args(["--config", name, "--config", "mine"]).config.name == "mine"


@pytest.mark.parametrize("joined", [True, False])
def test_an_unknown_recipe_is_refused_with_those_that_there_are(joined: bool) -> None:
    options = ["--config=bets"] if joined else ["--config", "bets"]
    with pytest.raises(
        ConfigError, match=r"found bets, .*best, best-lm, boss, demo,.* or the path of a YAML"
    ):
        parse_args(options)


def test_every_recipe_passes_the_checks_and_knows_only_existing_fields() -> None:
    for path in sorted(RECIPES.glob("*.yaml")):
        given = flatten(yaml.safe_load(path.read_text()))
        config = parse_args(["--config", str(path)]).config
        assert given.items() <= flatten(config.to_dict()).items(), path


def test_no_recipe_says_anything_twice() -> None:
    """YAML takes the last one, and nobody sees that there was another."""
    for path in sorted(RECIPES.glob("*.yaml")):
        nodes = [yaml.compose(path.read_text())]
        for node in nodes:
            if isinstance(node, yaml.MappingNode):
                names = [key.value for key, _ in node.value]
                assert len(set(names)) == len(names), (path.name, names)
                nodes += [value for _, value in node.value]


def test_best_has_all_that_is_ours() -> None:
    config = parse_args(["--config", str(RECIPES / "best.yaml")]).config
    model, augment = config.model, config.augment
    assert model.encoder in SHIPPED
    assert (model.pooling, model.classifier) == ("attentive_statistics", "cosine")
    assert min(augment.reverb, augment.channel, augment.babble, augment.noise) > 0
    assert config.loss.margin_growth > 0
    assert config.train.average_decay > 0
    assert config.predict.backend == "wccn"


def test_best_lm_is_the_model_of_best_on_longer_segments_with_a_larger_margin() -> None:
    best, tuned = (parse_args(["--config", name]).config for name in ("best", "best-lm"))
    # Otherwise the weights of best would be refused.
    assert tuned.model == best.model
    assert tuned.train.start_from == "runs/best"
    assert 300 <= tuned.data.segment_frames <= 600
    assert (tuned.loss.name, tuned.loss.margin, tuned.loss.margin_growth) == ("aam_softmax", 0.5, 0)
    assert tuned.optim.lr <= best.optim.lr / 5
    assert tuned.train.total_steps <= best.train.total_steps / 10
    for name in ("reverb", "channel", "babble", "noise", "freq_masks", "time_masks"):
        assert getattr(tuned.augment, name) <= getattr(best.augment, name)
    assert tuned.train.average_decay > 0
    other = parse_args(["--config", "best-lm", "--train.start_from", "runs/other"]).config
    assert other.train.start_from == "runs/other"


def test_later_options_win_over_the_file_and_keep_the_rest() -> None:
    simple = str(RECIPES / "simple.yaml")
    config = parse_args(["--config", simple, "--optim.lr", "3e-4", "--data.batch_size=16"]).config
    plain = parse_args(["--config", simple]).config
    changed = {k for k, v in flatten(plain.to_dict()).items() if flatten(config.to_dict())[k] != v}
    assert changed == {"optim.lr", "data.batch_size"}
    assert config.optim.lr == 3e-4


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--optim.lr", "fast"], ["optim.lr: found fast, allowed is a number"]),
        (["--optim.lr", "-1"], ["optim.lr", "-1", "more than 0"]),
        (["--optim.lr", "0"], ["optim.lr", "0", "more than 0"]),
        (["--optim.weight_decay", ".inf"], ["optim.weight_decay"]),
        (["--optim.clip_norm", "-1"], ["optim.clip_norm", "-1", "0 or more"]),
        (["--optim.warmup_steps", "-1"], ["optim.warmup_steps", "-1", "0 or more"]),
        (["--optim.lr", "9" * 400], ["the command line", "too large"]),
        (["--data.batch_size", "0"], ["data.batch_size", "found 0", "1 or more"]),
        (["--data.batch_size", "1.5"], ["data.batch_size: found 1.5, allowed is a whole number"]),
        (
            ["--model.encoder", "rnn"],
            [
                "model.encoder: found 'rnn', allowed is conformer, transformer, or package.module:",
            ],
        ),
        (["--model.dropout", "1"], ["model.dropout", "1.0", "less than 1"]),
        (["--model.kernel_size", "30"], ["model.kernel_size", "30", "odd"]),
        (["--model.ff_dim", "1000"], ["model.ff_dim", "1000", "multiple"]),
        (["--model.encoder", "transformer", "--model.dim", "80"], ["model.head_dim", "64", "80"]),
        (["--model.classifier", "linear"], ["model.classifier", "linear", "cosine"]),
        ([*SOFTMAX], ["model.classifier", "cosine", "linear or mlp"]),
        (["--loss.margin", "null"], ["loss.margin", "null", "a number with am_softmax"]),
        (["--loss.margin", "2"], ["loss.margin", "2.0"]),
        (["--loss.scale", "0"], ["loss.scale", "0.0", "more than 0"]),
        (
            ["--model.classifier=linear", *SOFTMAX[:1], *SOFTMAX[2:]],
            ["loss.margin", "0.2", "null with softmax"],
        ),
        (["--train.stop_step", "70001"], ["train.stop_step", "70001", "70000"]),
        (["--model.stem_channels", "-1"], ["model.stem_channels", "found -1"]),
        (["--model.subsampling", "3"], ["model.subsampling", "found 3", "2 or less"]),
        (["--model.embedding_dim", "0"], ["model.embedding_dim", "found 0", "null"]),
        (["--augment.noise", "1.5"], ["augment.noise", "1.5", "1 or less"]),
        (["--augment.reverb", "-0.1"], ["augment.reverb", "-0.1", "0 or more"]),
        (["--augment.babble_snr", "[9, 3]"], ["augment.babble_snr", "[9.0, 3.0]", "lower one"]),
        (["--augment.noise_snr", "[1]"], ["augment.noise_snr"]),
        (["--augment.reverb_seconds", "[0, 1]"], ["augment.reverb_seconds", "above 0"]),
        (["--loss.margin_growth", "2"], ["loss.margin_growth", "2.0", "1 or less"]),
        (["--loss.name", "aam_softmax", "--loss.margin", "null"], ["loss.margin", "aam_softmax"]),
        (["--train.average_decay", "1"], ["train.average_decay", "1.0", "less than 1"]),
        (["--train.keep", "0"], ["train.keep", "found 0", "1 or more"]),
        (["--train.seed", "-1"], ["train.seed", "-1", "0 or more"]),
        (["--train.seed", str(2**63)], ["train.seed", str(2**63), "less than 2**63"]),
        (["--data.eval_frames", "9" * 23], ["data.eval_frames", "9" * 23, "less than 2**63"]),
        (["--train.trackers", "[nothing]"], ["train.trackers", "nothing", "tensorboard"]),
        (["--name", "a/b"], ["name", "a/b", "folder name"]),
        (["--name", "a\nb"], ["name", "'a\\nb'", "folder name"]),
        (["--no.such", "1"], ["--no.such", "--help"]),
        (["--optim.l", "1"], ["--optim.l", "--help"]),
        (["--config", "nowhere.yaml"], ["--config", "nowhere.yaml", "No such file"]),
        (["--config"], ["the command line", "--config"]),
        (["--data.batch_size"], ["--data.batch_size: found nothing, allowed is a whole number"]),
        (["--data.global_batch", "x"], ["found x, allowed is a whole number or null"]),
        (["--loss.margin", "yes"], ["loss.margin: found yes, allowed is a number or null"]),
        (["--train.trackers", "wandb"], ["train.trackers: found wandb, allowed is a list in bra"]),
        (["--optim", "3"], ["optim: found 3, allowed is a mapping of its fields"]),
        (["--optim.lrr", "1"], ["no such field; did you mean optim.lr?"]),
        (["--batch_size", "8"], ["no such field; did you mean data.batch_size?"]),
        (["smoke"], ["smoke: no such field (a recipe goes with --config NAME)"]),
        (["stray"], ["stray"]),
    ],
)
def test_what_does_not_fit_is_refused_with_field_found_and_allowed(
    options: list[str], parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args(options)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert message.startswith(("the command line: ", "--config: ", "train.trackers: "))
    assert "\n" not in message.replace(str(options), "")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("optim: {learning_rate: 1}", "learning_rate"),
        ("optimiser: {lr: 1}", "optimiser"),
        ("a: [", "not a YAML file"),
        ("name: 2024-13-45", "not a YAML file"),
        ("[" * 5000, "not a YAML file"),
        ("optim: 3", "optim: found 3, allowed is a mapping"),
        ("optim: null", "optim: found None, allowed is a mapping"),
        ("optim: {lr: fast}", "optim.lr"),
        ("optim: {lr: -1}", "optim.lr: found -1.0, allowed is more than 0"),
        ("train: {total_steps: 5, stop_step: 6}", "train.stop_step: found 6"),
        ("resume: true", "resume"),
        ("- 1", "found a list, allowed is a mapping"),
        ("boss", "found a str, allowed is a mapping"),
        ("", "found nothing, allowed is a mapping"),
        ("optim:\n\tlr: 1", "not a YAML file (YAML takes no tabs; indent with spaces: "),
        ("<!DOCTYPE html><title>Quota</title>", "is a web page (its title: 'Quota')"),
        (
            "version https://git-lfs.github.com/spec/v1\n",
            "run `git lfs pull`; expected a YAML file",
        ),
        ("# only a comment", "found nothing, allowed is a mapping"),
    ],
)
@pytest.mark.parametrize("joined", [True, False])
def test_a_fault_of_a_file_names_the_file(
    tmp_path: Path, text: str, part: str, joined: bool
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    options = [f"--config={path}"] if joined else ["--config", str(path)]
    with pytest.raises(ConfigError) as caught:
        parse_args(["--config", str(RECIPES / "boss.yaml"), *options, "--optim.clip_norm", "2"])
    assert str(caught.value).startswith(f"{path}: ")
    assert part in str(caught.value)


def test_bytes_that_are_no_text_and_folders_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.yaml: not a YAML file"):
        parse_args(["--config", str(path)])
    with pytest.raises(ConfigError, match="cannot be read"):
        parse_args(["--config", str(tmp_path)])


@pytest.mark.parametrize("text", ['{"optim": {"lr": 0.5}}', "\ufeffoptim: {lr: 0.5}"])
def test_a_file_may_be_json_and_begin_with_a_byte_order_mark(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(text, encoding="utf-8")
    assert parse_args(["--config", str(path)]).config.optim.lr == 0.5


def test_an_option_can_correct_a_file_and_its_own_faults_are_its_own(tmp_path: Path) -> None:
    path = tmp_path / "part.yaml"
    path.write_text("optim: {lr: -1}")
    assert parse_args(["--config", str(path), "--optim.lr", "1"]).config.optim.lr == 1
    with pytest.raises(ConfigError, match=r"^the command line: optim\.lr: found -2"):
        parse_args(["--config", str(path), "--optim.lr", "-2"])


@pytest.mark.parametrize(
    ("total", "warmup", "taken"), [(200, 1000, 20), (20, 20, 2), (9, 9, 0), (1, 5, 0)]
)
def test_a_warm_up_as_long_as_the_run_becomes_a_tenth_of_it(
    tmp_path: Path, total: int, warmup: int, taken: int
) -> None:
    options = [f"--train.total_steps={total}", f"--optim.warmup_steps={warmup}"]
    asked = parse_args(options)
    assert asked.config.optim.warmup_steps == taken
    (note,) = asked.notes
    assert f"optim.warmup_steps {warmup:,} " in note
    assert f"train.total_steps {total:,};" in note
    path = tmp_path / "config.yaml"
    path.write_text(asked.config.to_yaml())
    again = parse_args(["--config", str(path)])
    assert (again.config, again.notes) == (asked.config, ())


def test_a_warm_up_shorter_than_the_run_stays() -> None:
    asked = parse_args(["--train.total_steps=20", "--optim.warmup_steps=19"])
    assert (asked.config.optim.warmup_steps, asked.notes) == (19, ())


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--config", str(RECIPES / "medium.yaml"), "--optim.lr", "1e-7", "--train.stop_step=5"],
        ["--config", str(RECIPES / "smoke.yaml"), "--train.trackers=[]", "--name=2024"],
        ["--config", str(RECIPES / "best.yaml"), "--augment.noise_snr", "[0, 15]"],
    ],
)
def test_yaml_reads_back_to_an_equal_configuration(tmp_path: Path, options: list[str]) -> None:
    config = parse_args(options).config
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert parse_args(["--config", str(path)]).config == config


def test_a_dict_from_another_version_is_refused_by_name() -> None:
    values = Config().to_dict()
    assert parse_config(values) == Config()
    values["model"]["depth"] = 3
    with pytest.raises(ConfigError, match="depth"):
        parse_config(values)
    del values["model"]["depth"]
    # What is newer than the file had its default.
    del values["model"]["center"]
    assert parse_config(values) == Config()
    del values["model"]
    with pytest.raises(ConfigError, match="model"):
        parse_config(values)


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("data.batch_size", [1, 5, 2**63 - 1], [0, -5, True, 1.0, "1", None, 2**63, 10**600]),
        ("data.prefetch", [0, 5], [-1]),
        ("data.global_batch", [None, 8], [0, 3.5, "3"]),
        ("data.pad_value", [-0.5, 3], [True, "0.5", None, nan, inf]),
        ("data.cache_gb", [None, 0.1], [0, nan, inf]),
        ("model.center", [True], [1, None]),
        ("data.shards", ["", "a", ["a", "b"]], [b"a", 1, [1], []]),
        ("model.pooling", ["mean"], ["c", 1, ["mean"]]),
        ("train.trackers", [[], ["a"]], [[1], "a", None]),
        (
            "augment.noise_snr",
            [(1, 2.5), [0.0, 1.0]],
            [(1,), (1, 2, 3), (1, "2"), 5, (1, inf)],
        ),
    ],
)
def test_a_saved_value_of_another_type_or_out_of_bounds_is_refused_by_field(
    field: str, good: list[Any], bad: list[Any]
) -> None:
    part, name = field.split(".")
    for value in good:
        values = Config().to_dict()
        values[part][name] = value
        found = flatten(parse_config(values).to_dict())[field]
        assert found == (tuple(value) if name == "noise_snr" else value)
    for value in bad:
        values = Config().to_dict()
        values[part][name] = value
        with pytest.raises(ConfigError) as caught:
            parse_config(values)
        message = str(caught.value)
        assert message.startswith(field)
        assert "found" in message
        assert "allowed" in message
        assert len(message) < 300


@pytest.mark.parametrize("values", [5, None, [], {}, {"name": "a"}, {**Config().to_dict(), "x": 1}])
def test_what_is_no_configuration_is_refused(values: Any) -> None:
    with pytest.raises(ConfigError):
        parse_config(values)


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_args(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "`accelerate launch` replaces all but 0 by 1" in text
    for key in flatten(Config().to_dict()):
        assert f"--{key}" in text
    for part in PARTS:
        kind = type(getattr(Config(), part))
        source = Path(__import__(kind.__module__, fromlist=["x"]).__file__).read_text()
        for field in dataclasses.fields(kind):
            # The docstring beneath a field begins its help.
            after = source.split(f"\n    {field.name}: ")[1].split('"""')[1]
            words = " ".join(after.split()).split(" ")[:3]
            assert " ".join(words) in text, field.name


def test_the_folder_of_a_run_or_a_model_stands_for_its_options(tmp_path: Path) -> None:
    config = parse_args(["--optim.lr", "0.125", "--name", "first"]).config
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "config.yaml").write_text(config.to_yaml())
    found = parse_args(["--config", str(tmp_path / "first"), "--name", "second"]).config
    assert (found.optim, found.model, found.name) == (config.optim, config.model, "second")
