"""Processes that this program starts itself, where a launcher does not, and waits for."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from shardprep_trainer.processes.interrupt import StopSignals
from shardprep_trainer.processes.launch import Share

_POLL_SECONDS = 0.1
# Less than the time that train.py lets the main process speak first.
_GRACE_SECONDS = 3.0


def start_processes(share: Share) -> int:
    """Run this program again as the processes of this machine's share, and wait.

    They learn of those of other machines by the address and port that this one was given.

    Ctrl-C reaches them from the terminal; SIGTERM, and the death of the launcher, are passed on.
    A process that the system killed is named on stderr.

    Returns:
        The exit code: 0 if all ended well, else that of the first that did not.
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
        # The port that accelerate names may be taken by another run.
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
    failed, deadline, told = 0, float("inf"), False
    while None in (codes := [worker.poll() for worker in workers]):
        if not failed and any(codes):
            # The others are stuck in an exchange with it; the main one may still have a word.
            failed, deadline = _first(codes), time.monotonic() + _GRACE_SECONDS
        if time.monotonic() > deadline:
            break
        if signals.received == signal.SIGTERM and not told:
            told = True
            for worker in workers:
                worker.terminate()
        time.sleep(_POLL_SECONDS)
    code = failed or _first(codes)
    # A negative code names the signal that killed a worker.
    if code < 0 and not signals.received:
        print(_obituary(first + codes.index(code), -code), file=sys.stderr, flush=True)
    return code if code >= 0 else 128 - code


def _first(codes: Sequence[int | None]) -> int:
    """The code that explains the others, which fail when one of them is killed; 0 for none."""
    return min((code for code in codes if code), key=lambda code: code > 0, default=0)


def _obituary(rank: int, number: int) -> str:
    """What to tell of a process that died of signal `number`, and what to do."""
    why: dict[int, str] = {
        signal.SIGKILL: " (out of memory?)",
        signal.SIGBUS: " (a shard was changed or its disk failed while it was mapped; run "
        "`shardprep verify`)",
    }
    name, reason = signal.Signals(number).name, why.get(number, "")
    return (
        f"error: process {rank} was killed by {name}{reason}; give the same command with --resume "
        "to go on from the newest checkpoint"
    )
