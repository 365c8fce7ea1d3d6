"""Errors name file, key and remedy, have an exit code, and can be pickled."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from shardprep import errors

EXIT_CODES = {
    errors.ShardprepError: 1,
    errors.CorruptShardError: 1,
    errors.SourceError: 3,
    errors.FormatError: 4,
    errors.VersionError: 4,
    errors.BuildError: 5,
    errors.StorageError: 6,
    errors.MissingExtraError: 2,
    errors.PlatformError: 2,
}


def test_every_error_has_the_documented_exit_code() -> None:
    found = {
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.ShardprepError)
    }
    assert {kind: kind.exit_code for kind in found} == EXIT_CODES
    for kind, code in EXIT_CODES.items():
        if kind is not errors.ShardprepError:
            row = next(
                line for line in (errors.__doc__ or "").splitlines() if kind.__name__ in line
            )
            assert str(code) in row


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "broken"),
        ({"file": Path("a.tar")}, "a.tar: broken"),
        ({"key": "k"}, "k: broken"),
        ({"file": "a.tar", "key": "k", "remedy": "Repair it."}, "a.tar: k: broken. Repair it."),
    ],
)
def test_message_is_file_key_fault_and_remedy(fields: dict[str, str], text: str) -> None:
    assert str(errors.ShardprepError("broken", **fields)) == text  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", EXIT_CODES)
def test_pickle_keeps_the_kind_and_every_field(kind: type[errors.ShardprepError]) -> None:
    error = kind("broken", file="a.tar", key="k", remedy="Repair it.")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (str(again), again.file, again.key) == (str(error), "a.tar", "k")


def test_control_characters_of_a_name_do_not_reach_the_terminal() -> None:
    error = errors.ShardprepError("is bad", file="a\x1b[2J.pt", key="k\0")
    assert str(error) == r"a\x1b[2J.pt: k\x00: is bad"


def test_missing_package_is_an_error_that_names_the_extra() -> None:
    with pytest.raises(errors.MissingExtraError) as caught, errors.needs("train"):
        raise ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn")
    assert str(caught.value) == (
        "the package torch is not installed. Run: pip install 'shardprep[train]'"
    )
    assert isinstance(caught.value, ImportError)


@pytest.mark.parametrize("name", ["shardprep.load", "shardprep_trainer", None])
def test_a_missing_module_of_our_own_is_not_a_missing_extra(name: str | None) -> None:
    with pytest.raises(ModuleNotFoundError), errors.needs("train"):
        raise ModuleNotFoundError("No module named ...", name=name)
