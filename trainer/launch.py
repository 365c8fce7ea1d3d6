"""What `accelerate launch` was asked for, and what it leaves to others to do.

`accelerate launch --num_processes 2 --cpu` starts one process: for more on CPUs it counts on
mpirun, and without it says nothing. That one process then starts the rest here, and waits.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer.errors import ConfigError
from trainer.interrupt import StopSignals, launched_by_accelerate

# torchrun, mpirun and `accelerate launch` on GPUs tell each process its place by one of these.
_PLACED = ("RANK", "LOCAL_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_POLL_SECONDS = 0.1
# Less than the time that train.py lets the main process speak first.
_GRACE_SECONDS = 3.0


def check_launch(environment: dict[str, str], command: list[str]) -> None:
    """Refuse flags of the launch that would be passed over in silence, or that cannot work.

    Args:
        environment: Of this process.
        command: Command line of the parent process, which may be the launcher.

    Raises:
        ConfigError: Naming the flag and what to give in its place.
    """
    if not launched_by_accelerate(environment):
        return
    # The launcher hands this on to DeepSpeed alone.
    given = re.search(r"__gradient_accumulation_steps[ =](\S+)", _options(command))
    steps = given[1] if given else environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps != "1":
        raise ConfigError(
            f"accelerate launch --gradient_accumulation_steps: found {steps}, which the launcher "
            f"would not pass on; give --train.accumulate {steps} after trainer/train.py instead"
        )
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if environment.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise ConfigError(
                f"accelerate launch --use_{name.lower()}: the model is trained whole on every "
                "process; leave this flag out"
            )


def launch_command(*, processes: int, device: str, precision: str) -> str:
    """The start of a command line that launches this program once more in the same way.

    Args:
        processes: Number of processes.
        device: Type of their devices, e.g. "cpu".
        precision: Mixed precision: no, fp16 or bf16.

    Returns:
        From `accelerate launch` to the script, as a shell takes it from the current folder.
    """
    # Without a number the launcher takes one process for every GPU.
    flags = ["--num_processes", str(processes)]
    if device == "cpu":
        flags.append("--cpu")
    if precision != "no":
        flags += ["--mixed_precision", precision]
    script, here = Path(__file__).with_name("train.py"), Path.cwd()
    shown = script.relative_to(here) if script.is_relative_to(here) else script
    return shlex.join(["accelerate", "launch", *flags, str(shown)])


def processes_to_start(environment: dict[str, str], command: list[str]) -> int:
    """How many processes this one has to start, 1 for none beside itself.

    Args:
        environment: Of this process.
        command: Command line of the parent process, which may be the launcher.

    Raises:
        ConfigError: Several were asked for in a way that cannot be made up for.
    """
    # accelerate sets a port exactly if it was asked for several processes.
    if not launched_by_accelerate(environment) or "MASTER_PORT" not in environment:
        return 1
    if any(name in environment for name in _PLACED):
        return 1
    options = _options(command)
    number = re.search(r"__num_processes[ =](\d+)", options)
    machines = re.search(r"__num_machines[ =](\d+)", options)
    if number is None or (machines and int(machines[1]) > 1):
        raise ConfigError(
            "accelerate launch was asked for several processes on CPUs but starts one; give "
            "--num_processes N on its command line, or start them with "
            "`torchrun --nproc_per_node N trainer/train.py`, on each machine"
        )
    return int(number[1])


def parent_command() -> list[str]:
    """Command line of the parent process, empty where the system does not tell."""
    try:
        text = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        return []
    return os.fsdecode(text).split("\0")


def _options(command: list[str]) -> str:
    """A command line in which all options are spelt with underscores, as both are allowed."""
    return " ".join(command).replace("-", "_")


def restarted_since(environment: Mapping[str, str]) -> float | None:
    """When the launcher began that has started this process anew, as torchrun does on a failure.

    Args:
        environment: Of this process.

    Returns:
        Seconds since the epoch, or None if this is the first start.
    """
    if not int(environment.get("TORCHELASTIC_RESTART_COUNT", "0")):
        return None
    # The 22nd field, counted from behind the name, which may hold anything.
    fields = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    age = uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - age


def start_processes(number: int) -> int:
    """Run this program again as `number` processes that know of one another, and wait.

    Ctrl-C reaches them from the terminal; SIGTERM, and the death of the launcher, are passed on.
    A process that the system killed is named on stderr.

    Returns:
        The exit code: 0 if all ended well, else that of the first that did not.
    """
    command = [sys.executable, *sys.orig_argv[1:]]
    workers = [
        subprocess.Popen(command, env={**os.environ, **place})
        for place in _places(number, _free_port())
    ]
    try:
        with StopSignals() as signals:
            return _wait(workers, signals)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def _places(number: int, port: int) -> list[dict[str, str]]:
    shared = {
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait(workers: list[subprocess.Popen[bytes]], signals: StopSignals) -> int:
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
        print(_obituary(codes.index(code), -code), file=sys.stderr, flush=True)
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
