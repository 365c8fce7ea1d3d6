"""Processes that this program starts itself where the launcher does not; it waits for them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

import click

from shardprep_trainer.processes.interrupt import StopSignals
from shardprep_trainer.processes.launch import Share

_POLL_SECONDS = 0.1
# Less than the time that the other processes leave the main process to print its error first.
_GRACE_SECONDS = 3.0


def start_processes(share: Share) -> int:
    """Start this program again, once for each process of this machine's share, and wait.

    The processes get the address and port that this one was given, to find the other machines.
    Ctrl-C reaches them from the terminal; this process passes on SIGTERM and the death of the
    launcher. It names on stderr a process that a signal has killed.

    Returns:
        The exit code: 0 if all succeeded, else that of the first process that failed.
    """
    command = [sys.executable, *sys.orig_argv[1:]]
    workers = [subprocess.Popen(command, env={**os.environ, **place}) for place in _places(share)]
    try:
        with StopSignals() as signals:
            return _wait(workers, signals, share.machine * share.number)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def _places(share: Share) -> list[dict[str, str]]:
    shared = {
        "WORLD_SIZE": str(share.world_size),
        "LOCAL_WORLD_SIZE": str(share.number),
        "GROUP_WORLD_SIZE": str(share.machines),
        "GROUP_RANK": str(share.machine),
    }
    if share.machines == 1:
        # Another run may use the port that accelerate names.
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    first = share.machine * share.number
    return [
        {**shared, "RANK": str(first + local), "LOCAL_RANK": str(local)}
        for local in range(share.number)
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait(workers: list[subprocess.Popen[bytes]], signals: StopSignals, first: int) -> int:
    failed, deadline, terminated = 0, float("inf"), False
    while None in (codes := [worker.poll() for worker in workers]):
        if not failed and any(codes):
            # The others wait for this one for ever; the main process may still print its error.
            failed, deadline = _first(codes), time.monotonic() + _GRACE_SECONDS
        if time.monotonic() > deadline:
            break
        if signals.received == signal.SIGTERM and not terminated:
            terminated = True
            for worker in workers:
                worker.terminate()
        time.sleep(_POLL_SECONDS)
    code = failed or _first(codes)
    # A negative code names the signal that killed a worker.
    if code < 0 and not signals.received:
        click.echo(_describe_death(first + codes.index(code), -code), err=True)
    return code if code >= 0 else 128 - code


def _first(codes: Sequence[int | None]) -> int:
    """The code of the first failure, 0 for none: a killed process makes the others fail."""
    return min((code for code in codes if code), key=lambda code: code > 0, default=0)


def _describe_death(rank: int, number: int) -> str:
    """The message about a process that signal `number` has killed."""
    why: dict[int, str] = {
        signal.SIGKILL: " (out of memory?)",
        signal.SIGBUS: " (a shard was changed or its disk failed while it was mapped; run "
        "`shardprep verify`)",
    }
    name, reason = signal.Signals(number).name, why.get(number, "")
    return (
        f"error: process {rank} was killed by {name}{reason}; give the same command with --resume "
        "to continue from the newest checkpoint"
    )
