"""The command line of training: a recipe, then overrides, checked before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import jsonargparse

from trainer.config import Config, check
from trainer.errors import ConfigError

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Invocation:
    """What a command line asks for."""

    config: Config
    resume: bool
    """Continue from the newest checkpoint of the run folder."""
    print_config: bool
    """Print the resolved configuration and do nothing else."""


def parse_args(argv: Sequence[str]) -> Invocation:
    """Read and check a command line.

    Args:
        argv: Arguments without the program's name, e.g. `["--config", "recipe.yaml",
            "--optim.lr", "3e-4"]`. Later ones win; without `--config` the boss recipe goes first.

    Returns:
        The checked configuration and what to do with it.

    Raises:
        ConfigError: An unknown or ill-typed field, an unreadable file, or a bad combination.
    """
    arguments = list(argv)
    given = any(item.split("=")[0] == "--config" for item in arguments)
    if not given:
        arguments = ["--config", str(RECIPES / "boss.yaml"), *arguments]
    parser = _parser()
    try:
        parsed = parser.parse_args(arguments)
    except jsonargparse.ArgumentError as error:
        detail = " ".join(str(error).replace("Parser key", "field").split())
        where = "the file of --config or the command line" if given else "the command line"
        raise ConfigError(f"{where}: {detail}; --help lists every field with its type") from error
    for part in ("data", "model", "loss", "optim", "train"):
        if not isinstance(parsed[part], jsonargparse.Namespace):
            raise ConfigError(f"{part}: found {parsed[part]}, allowed is a mapping of its fields")
    values = parser.instantiate(parsed)
    config = Config(values.name, values.data, values.model, values.loss, values.optim, values.train)
    check(config)
    _check_trackers(config.train.trackers)
    return Invocation(config, parsed.resume, parsed.print_config)


def _parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog="trainer/train.py",
        usage="accelerate launch [flags] trainer/train.py [--config FILE] [--FIELD VALUE ...]",
        description="Train a speaker classifier on shards. Precision, devices and processes are "
        "flags of `accelerate launch`; all the rest is below.",
        epilog="Exit codes: 0 done, 1 failed, 2 usage or configuration, 130 Ctrl-C and 143 SIGTERM "
        "(both after saving); errors of the shards have those of `shardprep`. Without --config "
        "the boss recipe is read.",
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,
    )
    parser.add_argument("--config", action="config", help="A recipe, or the config.yaml of a run.")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="Continue from the newest checkpoint of the run folder.",
    )
    parser.add_argument(
        "--print-config",
        "--print_config",
        action="store_true",
        help="Print the configuration that the other arguments give, as YAML, and leave.",
    )
    parser.add_class_arguments(Config)
    return parser


def _check_trackers(names: Sequence[str]) -> None:
    if all(name == "tensorboard" for name in names) and find_spec("tensorboard"):
        return
    # accelerate brings PyTorch, which --help and a wrong option need not wait for.
    from accelerate.tracking import get_available_trackers

    available = sorted(str(name) for name in get_available_trackers())
    for name in names:
        if name not in available:
            raise ConfigError(
                f"train.trackers: found {name}, allowed is what is installed of those that "
                f"accelerate knows: {', '.join(available) or 'none'}; pip install it, or give "
                "--train.trackers '[]'"
            )
