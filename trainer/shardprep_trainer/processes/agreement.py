"""Work that the processes of a launch, on one or several machines, must do or fail at together.

If one process fails alone, the others wait for it, and on other machines even the launcher does not
know why. So all processes do together what may fail on one of them, and all raise its error.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object

from shardprep import ShardprepError, storage_error
from shardprep_trainer.errors import ConfigError, ElsewhereError, TrainerError

Result = TypeVar("Result")


def together(work: Callable[[], Result]) -> Result:
    """Do some work on every process, and wait until all have done it.

    Raises:
        TrainerError: The error of this process, or else that of the lowest rank with an error. A
            ShardprepError is treated alike, and an OSError becomes a StorageError.
        ElsewhereError: Another process had an error, and this one had none.
    """
    result: Result | None = None
    own: TrainerError | ShardprepError | None = None
    try:
        result = work()
    except (TrainerError, ShardprepError) as error:
        own = error
    except OSError as error:
        own = storage_error(error)
    errors = exchange(None if own is None else (str(own), own.exit_code))
    if own is not None:
        raise own
    for place, failure in errors:
        if failure is not None:
            raise ElsewhereError(f"{place}: {failure[0]}", failure[1])
    return result  # type: ignore[return-value]


def exchange(value: Any) -> list[tuple[str, Any]]:
    """The values of all processes by rank, each with the name of its process and machine."""
    state = PartialState()
    place = f"process {state.process_index} on {socket.gethostname()}"
    if state.num_processes == 1:
        return [(place, value)]
    found: list[tuple[str, Any]] = gather_object([(place, value)])
    return found


def check_alike(values: Mapping[str, Any], remedy: str) -> None:
    """Make sure that some values are the same on all processes.

    Args:
        values: The value of this process by its name in the message.
        remedy: What to do if they differ.

    Raises:
        ConfigError: On every process, naming the first two that differ.
    """
    (first, expected), *others = exchange(dict(values))
    for place, found in others:
        for name in values:
            if found[name] != expected[name]:
                raise ConfigError(
                    f"{name}: {place} has {found[name]}, but {first} has {expected[name]}; {remedy}"
                )
