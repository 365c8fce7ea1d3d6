"""What the processes of a launch, which may run on several machines, have to agree on.

A process that fails alone leaves the others waiting for it, on machines whose launcher cannot see
why. So whatever may fail on one of them is done by all together, and its error is that of all.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object

from shardprep import ShardprepError
from shardprep_trainer.errors import ConfigError, ElsewhereError, TrainerError

Result = TypeVar("Result")


def together(work: Callable[[], Result]) -> Result:
    """Do on every process what each has to do by itself; wait for all.

    Raises:
        TrainerError: The error of this process, or else of the lowest that had one. The same goes
            for a ShardprepError and an OSError.
    """
    result: Result | None = None
    own: TrainerError | ShardprepError | OSError | None = None
    try:
        result = work()
    except (TrainerError, ShardprepError, OSError) as error:
        own = error
    told = exchange(None if own is None else (str(own), getattr(own, "exit_code", 1)))
    if own is not None:
        raise own
    for place, fault in told:
        if fault is not None:
            raise ElsewhereError(f"{place}: {fault[0]}", fault[1])
    return result  # type: ignore[return-value]


def exchange(value: Any) -> list[tuple[str, Any]]:
    """A value of every process, each with the name of the process and its machine, by rank."""
    state = PartialState()
    place = f"process {state.process_index} on {socket.gethostname()}"
    if state.num_processes == 1:
        return [(place, value)]
    found: list[tuple[str, Any]] = gather_object([(place, value)])
    return found


def check_alike(values: Mapping[str, Any], remedy: str) -> None:
    """Make sure that some values are the same on all processes.

    Args:
        values: What each is called in the message, and what it is on this process.
        remedy: What to do where they are not.

    Raises:
        ConfigError: On every process alike, naming the first two that differ.
    """
    (first, expected), *others = exchange(dict(values))
    for place, found in others:
        for name in values:
            if found[name] != expected[name]:
                raise ConfigError(
                    f"{name}: {place} has {found[name]}, but {first} has {expected[name]}; {remedy}"
                )
