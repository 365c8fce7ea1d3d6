"""Carry out the tasks of a build in parallel: what every pool does, and the progress it reports."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Protocol, TypeVar

from shardprep.build.plan import ShardTask
from shardprep.build.shard import Advance, ShardRecord

Task = TypeVar("Task")
Result = TypeVar("Result")


class Pool(Protocol):
    """Runs tasks in parallel: in processes of this machine, or on the nodes of a cluster."""

    def run(
        self,
        work: Callable[[Task, Advance], Result],
        tasks: Sequence[Task],
        on_progress: Callable[[int, int], None],
    ) -> Generator[Result, None, None]:
        """Run `work` on every task, and yield the results in the order in which they come.

        Closing the generator early, or an error in a task, stops the other tasks.

        Args:
            work: What to do with a task. It calls its second argument after each utterance, with
                the bytes of the utterance.
            tasks: The tasks. They and `work` must pickle.
            on_progress: Called with the utterances and bytes done since the last call.

        Raises:
            BuildError: The pool cannot carry out the tasks.
        """


class ProgressListener:
    """Receives the progress of a build; this default ignores it."""

    def start(self, utterances: int, nbytes: int) -> None:
        """Called first, with the utterances and bytes to read."""

    def advance(self, utterances: int, nbytes: int) -> None:
        """Called with the utterances and bytes read since the last call."""

    def note(self, text: str) -> None:
        """Called before work that the user may not expect, with its reason."""

    def close(self) -> None:
        """Called last."""


def run_shards(
    tasks: Sequence[ShardTask],
    work: Callable[[ShardTask, Advance], ShardRecord],
    pool: Pool,
    listener: ProgressListener,
) -> list[ShardRecord]:
    """Carry out shard tasks.

    Args:
        tasks: The tasks.
        work: What to do with each task.
        pool: Where to do it.
        listener: Receives the progress.

    Returns:
        The records of the shards, in the order in which they were finished.
    """
    utterances = [utterance for task in tasks for utterance in task.plan.utterances]
    listener.start(len(utterances), sum(utterance.nbytes for utterance in utterances))
    results = pool.run(work, tasks, listener.advance)
    try:
        return list(results)
    finally:
        results.close()
        listener.close()
