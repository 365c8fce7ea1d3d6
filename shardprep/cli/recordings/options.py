"""The options of the recipe from recordings to log-mels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import click

from shardprep.audio.recipe import FeatureRecipe
from shardprep.build.known_features import HOMEWORK, recipe_at
from shardprep.errors import SourceError

_Command = TypeVar("_Command", bound=Callable[..., Any])
_DEFAULT = FeatureRecipe()
_NONE = "none"

_HELP = {
    "sample_rate": "Rate that recordings are brought to [Hz].",
    "peak_db": "Level of the highest sample [dB of full scale]; none leaves it.",
    "silence_level": "Samples below are quiet [share of full scale]; none removes no silence.",
    "silence_seconds": "Quiet stretches that are longer are removed [s].",
    "n_fft": "Length of the Fourier transform [samples].",
    "win_length": "Length of the Hann window [samples].",
    "hop_length": "From one frame to the next [samples].",
    "power": "1 for magnitudes, 2 for power.",
    "f_min": "Lower edge of the lowest mel bin [Hz].",
    "f_max": "Upper edge of the highest mel bin [Hz].",
    "mel_scale": "Scale of the mel bins.",
    "norm": "slaney divides each mel bin by its width; none does not.",
    "log_floor": "The natural logarithm is taken of max(x, this).",
}


class _OrNone(click.ParamType):  # type: ignore[type-arg]
    """A number, or the word none."""

    name = "float|none"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float | str:
        if value == _NONE:
            return _NONE
        return float(click.FLOAT.convert(value, param, ctx))


def _kind(field: dataclasses.Field[Any]) -> Any:
    if field.name == "mel_scale":
        return click.Choice(["htk", "slaney"])
    if field.name == "norm":
        return click.Choice(["slaney", _NONE])
    kinds = {"int": int, "float": float}
    return kinds.get(str(field.type)) or _OrNone()


def recipe_options(command: _Command) -> _Command:
    """Give a command the options of a recipe, but for --n-mels; `recipe_of` takes their values."""
    for field in reversed(dataclasses.fields(FeatureRecipe)):
        if field.name != "n_mels":
            default = getattr(_DEFAULT, field.name)
            command = click.option(
                f"--{field.name.replace('_', '-')}",
                type=_kind(field),
                default=_NONE if default is None else default,
                show_default=True,
                help=_HELP[field.name],
            )(command)
    return click.option(
        "--features-from",
        metavar="PLACE",
        help="Take the recipe of a shard set, a run or a model, or the word "
        f"{HOMEWORK}. Where the source is features, this says how they were made.",
    )(command)


def recipe_of(options: dict[str, Any]) -> FeatureRecipe | None:
    """The recipe that the options ask for, which are removed; None where there are none.

    Args:
        options: All options of a command, by name.

    Raises:
        UsageError: A value that cannot be, or --features-from with another option.
        FormatError: --features-from names nothing that has a recipe.
    """
    place = options.pop("features_from")
    source_of = click.get_current_context().get_parameter_source
    given: dict[str, Any] = {}
    for field in dataclasses.fields(FeatureRecipe):
        if field.name != "n_mels":
            value = options.pop(field.name)
            if source_of(field.name) is not click.core.ParameterSource.DEFAULT:
                given[field.name] = None if value == _NONE else value
    if place is None and not given:
        return None
    if options.get("n_mels") is not None:
        given["n_mels"] = options["n_mels"]
    if place is not None:
        if others := sorted(given):
            raise click.UsageError(
                f"--features-from has the whole recipe: leave out --{others[0].replace('_', '-')}"
            )
        return recipe_at(place)
    try:
        return FeatureRecipe(**given)
    except SourceError as error:
        name = str(error.key).replace("_", "-")
        raise click.BadParameter(error.what, param_hint=f"'--{name}'") from None
