"""The command line of training: a recipe, then overrides, checked before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import yaml

from shardprep import machine_errors, sniff
from shardprep_trainer.config.checks import parse_config, shorten_warmup
from shardprep_trainer.config.encoders import is_foreign
from shardprep_trainer.config.explain import explain
from shardprep_trainer.config.fields import PARTS, Config
from shardprep_trainer.errors import ConfigError

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

RECIPES = Path(__file__).parents[1] / "recipes"

_COMMAND_LINE = "the command line"
# What runs and models bring along.
_OF_RUN = "config.yaml"


@dataclass(frozen=True)
class Invocation:
    """What a command line asks for."""

    config: Config
    resume: bool
    """Continue from the newest checkpoint of the run folder."""
    print_config: bool
    """Print the resolved configuration and do nothing else."""
    notes: tuple[str, ...] = ()
    """What was not taken as it was given, for the user to know."""


def parse_args(argv: Sequence[str], program: str = "shardprep train") -> Invocation:
    """Read and check a command line.

    Args:
        argv: Arguments without the program's name, e.g. `["--config", "best", "--optim.lr",
            "3e-4"]`. Later ones win; without `--config` the boss recipe goes first.
        program: The command that these arguments follow, as the help shows it.

    Returns:
        The checked configuration and what to do with it.

    Raises:
        ConfigError: An unknown or ill-typed field, a missing file, or a bad combination; the
            message begins with the file, or says that it was the command line.
        StorageError: The disk or the machine refused to read a file.
    """
    arguments = _with_recipes(argv)
    files = {path: _read_file(path) for path in _config_files(arguments)}
    if not files:
        arguments = ["--config", str(RECIPES / "boss.yaml"), *arguments]
    try:
        parsed = _parser(program).parse_args(arguments)
    except (jsonargparse.ArgumentError, OverflowError) as error:
        # Every file has been read on its own by now.
        _refuse(_COMMAND_LINE, error)
    try:
        given = parse_config(_values(parsed))
    except ConfigError as error:
        guilty = [path for path, values in files.items() if _fault(values) == str(error)]
        raise ConfigError(f"{guilty[0] if guilty else _COMMAND_LINE}: {error}") from error
    _check_encoder(given.model.encoder, arguments, files)
    _check_trackers(given.train.trackers)
    config = shorten_warmup(given)
    notes = []
    if config != given:
        notes.append(
            f"optim.warmup_steps {given.optim.warmup_steps:,} is not shorter than the run, "
            f"train.total_steps {config.train.total_steps:,}; the warm-up takes a tenth of the "
            f"run, {config.optim.warmup_steps:,} steps"
        )
    return Invocation(config, parsed.resume, parsed.print_config, tuple(notes))


def _check_encoder(encoder: str, arguments: list[str], files: dict[str, dict[str, Any]]) -> None:
    """Refuse code that only a run or a model names, and not the user.

    Raises:
        ConfigError: The name is neither an option nor in a YAML file of the user's own.
    """
    if not is_foreign(encoder):
        return
    of_runs = [path for path in files if Path(path).name.casefold() == _OF_RUN]
    own = [values["model"]["encoder"] for path, values in files.items() if path not in of_runs]
    if encoder not in own + _values_of("--model.encoder", arguments):
        raise ConfigError(
            f"{of_runs[0] if of_runs else _COMMAND_LINE}: model.encoder: {encoder} is code that "
            f"does not come with shardprep, and a {_OF_RUN} may come from a stranger, so nothing "
            f"was imported; if you trust that code, name it yourself: --model.encoder {encoder}"
        )


def recipe_names() -> list[str]:
    """What `--config` takes beside files."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _with_recipes(argv: Sequence[str]) -> list[str]:
    """The arguments, with the file of each recipe that `--config` names.

    Raises:
        ConfigError: There is no recipe of such a name, nor a file.
    """
    arguments = list(argv)
    for at, word in enumerate(argv):
        if at and argv[at - 1] == "--config":
            arguments[at] = _recipe_file(word)
        elif word.startswith("--config="):
            arguments[at] = f"--config={_recipe_file(word.removeprefix('--config='))}"
    return arguments


def _recipe_file(given: str) -> str:
    names = recipe_names()
    if given in names:
        return str(RECIPES / f"{given}.yaml")
    if (of_run := Path(given) / _OF_RUN).is_file():
        return str(of_run)
    if "/" in given or "." in given or Path(given).exists():
        return given
    raise ConfigError(
        f"--config: found {given}, allowed is the name of a recipe ({', '.join(names)}), or "
        "the path of a YAML file or of a run"
    )


def _config_files(arguments: Sequence[str]) -> list[str]:
    return _values_of("--config", arguments)


def _values_of(option: str, arguments: Sequence[str]) -> list[str]:
    """What an option is given, each time that it is."""
    following = zip(arguments, arguments[1:], strict=False)
    apart = [value for name, value in following if name == option]
    joined = [item.split("=", 1)[1] for item in arguments if item.startswith(f"{option}=")]
    return apart + joined


def _read_file(path: str) -> dict[str, Any]:
    """Read a file of `--config` on its own, so that its faults are told from later options'."""
    try:
        with machine_errors(path):
            data = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"--config: {path} cannot be read ({error.strerror})") from error
    content_kind = sniff(data)
    if content_kind is not None and content_kind.kind not in ("text", "json", "empty"):
        raise ConfigError(f"{path}: {content_kind.what}; expected a YAML file")
    try:
        text = data.decode("utf-8-sig")
        content = yaml.safe_load(text)
    # A date that does not exist and bytes that are no text are a ValueError.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        why = _one_line(error)
        why = "YAML takes no tabs; indent with spaces: " + why if "'\\t'" in why else why
        raise ConfigError(f"{path}: not a YAML file ({why})") from error
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        raise ConfigError(
            f"{path}: found {found}, allowed is a mapping of fields like {RECIPES / 'boss.yaml'}"
        )
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Config)
    try:
        parsed = parser.parse_string(text)
    except (jsonargparse.ArgumentError, OverflowError) as error:
        _refuse(path, error)
    for part in PARTS:
        if not isinstance(parsed[part], jsonargparse.Namespace):
            raise ConfigError(
                f"{path}: {part}: found {parsed[part]}, allowed is a mapping of its fields"
            )
    return _values(parsed)


def _values(parsed: jsonargparse.Namespace) -> dict[str, Any]:
    """The fields of `Config` among what was parsed, as nested plain values."""
    values = parsed.as_dict()
    return {key: values[key] for key in ("name", *PARTS)}


def _fault(values: dict[str, Any]) -> str | None:
    try:
        parse_config(values)
    except ConfigError as error:
        return str(error)
    return None


def _refuse(origin: str, error: Exception) -> NoReturn:
    raise ConfigError(f"{origin}: {explain(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _parser(program: str) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        usage=f"{program} [--config NAME|FILE] [--FIELD VALUE ...]",
        description="Train a speaker model on shards. Precision, devices and processes are flags "
        "of `accelerate launch`; everything else is below.",
        epilog="Exit codes: 0 done, 1 failed, 2 usage or configuration, 124 no process has done a "
        "step for train.hang_seconds, 130 Ctrl-C and 143 SIGTERM (both after saving); errors of "
        "the shards have those of `shardprep`. These are the codes of the process itself: "
        "`accelerate launch` replaces all but 0 by 1. Without --config the recipe boss is read.",
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,
    )
    parser.add_argument(
        "--config",
        action="config",
        help=f"A recipe ({', '.join(recipe_names())}), or a YAML file, or the folder of a "
        "run or of a model, whose options are taken.",
    )
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
