"""What the user asked the launcher for, and what the launcher leaves to this program.

`accelerate launch --num_processes 2 --cpu` starts one process on each machine: it expects mpirun to
start several on CPUs, and without mpirun says nothing. This one process then starts the others, in
`shardprep_trainer.processes.workers`, and waits for them.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shardprep_trainer.errors import ConfigError

# torchrun, mpirun and `accelerate launch` on GPUs tell each process its rank by one of these.
_PLACED = ("RANK", "LOCAL_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


@dataclass(frozen=True)
class Share:
    """The processes of a launch that one machine has to start."""

    number: int
    """How many."""
    machine: int = 0
    """Number of this machine."""
    machines: int = 1
    """Number of machines, each with the same number of processes."""

    @property
    def world_size(self) -> int:
        """Processes of all machines."""
        return self.number * self.machines


def launched_by_accelerate(environment: Mapping[str, str]) -> bool:
    """Whether `accelerate launch` started a process with this environment."""
    return "ACCELERATE_MIXED_PRECISION" in environment


def check_launch(environment: dict[str, str], command: list[str]) -> None:
    """Refuse flags of a launcher that would be ignored without a word, or that cannot work.

    Args:
        environment: Of this process.
        command: Command line of the parent process, which may be the launcher.

    Raises:
        ConfigError: Naming the flag and what to give instead.
    """
    _check_elastic(environment, command)
    if not launched_by_accelerate(environment):
        return
    # The launcher passes this flag on to DeepSpeed only.
    given = re.search(r"__gradient_accumulation_steps[ =](\S+)", _options(command))
    steps = given[1] if given else environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps != "1":
        raise ConfigError(
            f"accelerate launch --gradient_accumulation_steps: found {steps}, which the launcher "
            f"would not pass on; give --train.accumulate {steps} after {training_program()} instead"
        )
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if environment.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise ConfigError(
                f"accelerate launch --use_{name.lower()}: every process trains the complete "
                "model; leave this flag out"
            )


def _check_elastic(environment: Mapping[str, str], command: list[str]) -> None:
    nodes = re.search(r"__nnodes[ =](\d+):(\d+)", _options(command))
    varies = nodes is not None and nodes[1] != nodes[2]
    # torchrun tells only the machines of the first round the address of the store that it keeps.
    if varies and environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        assert nodes is not None
        raise ConfigError(
            f"torchrun --nnodes {nodes[1]}:{nodes[2]}: a machine that joins later would not find "
            "the others; start torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the "
            "environment, on every machine"
        )


def training_program() -> str:
    """What a launcher must be given to train, as it works in the current folder.

    Returns:
        The path of the script if it lies below the current folder, else `-m` and the module.
    """
    # A wheel has no such script; a train.py beside the installed package belongs to another one.
    script = Path(__file__).resolve().parents[2] / "train.py"
    try:
        here = Path.cwd()
    except FileNotFoundError:
        # The current folder was removed.
        return "-m shardprep_trainer.train"
    if script.parent.name == "trainer" and script.is_file() and script.is_relative_to(here):
        return shlex.quote(str(script.relative_to(here)))
    return "-m shardprep_trainer.train"


def launch_command(*, processes: int, device: str, precision: str) -> str:
    """The start of a command line that launches the training once more in the same way.

    Args:
        processes: Number of processes.
        device: Type of their devices, e.g. "cpu".
        precision: Mixed precision: no, fp16 or bf16.

    Returns:
        From `accelerate launch` to the program, as a shell takes it in the current folder.
    """
    # Without a number the launcher starts one process for every GPU.
    flags = ["--num_processes", str(processes)]
    if device == "cpu":
        flags.append("--cpu")
    if precision != "no":
        flags += ["--mixed_precision", precision]
    return f"{shlex.join(['accelerate', 'launch', *flags])} {training_program()}"


def processes_to_start(environment: Mapping[str, str], command: list[str]) -> Share | None:
    """The processes that this one must start and wait for; None if it must train itself.

    Args:
        environment: Of this process.
        command: Command line of the parent process, which may be the launcher.

    Raises:
        ConfigError: The launcher should have started several, and their number is not known here.
    """
    # accelerate sets a port only if it was asked for several processes or machines.
    if not launched_by_accelerate(environment) or "MASTER_PORT" not in environment:
        return None
    if any(name in environment for name in _PLACED):
        return None
    options = _options(command)
    number, machines, machine = (
        _number(options, name) for name in ("num_processes", "num_machines", "machine_rank")
    )
    if number is None:
        raise ConfigError(
            "accelerate launch was asked for several processes on CPUs but starts one; give "
            "--num_processes N on its command line, or start them with "
            f"`torchrun --nproc-per-node N {training_program()}`, on each machine"
        )
    machines, machine = machines or 1, machine or 0
    if number % machines or machine >= machines:
        raise ConfigError(
            f"accelerate launch --num_processes {number} --num_machines {machines} --machine_rank "
            f"{machine}: the first counts the processes of all machines, so give a multiple of "
            "the second; the third is 0 on the first machine and less than their number on the "
            "last"
        )
    return None if number == 1 else Share(number // machines, machine, machines)


def _number(options: str, name: str) -> int | None:
    """The value of an option, or None; the last one counts, as it does for the launcher."""
    found = re.findall(rf"__{name}[ =](\d+)", options)
    return int(found[-1]) if found else None


def parent_command() -> list[str]:
    """Command line of the parent process; empty if the system does not know it."""
    try:
        text = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        return []
    return os.fsdecode(text).split("\0")


def _options(command: list[str]) -> str:
    """A command line with underscores for hyphens: launchers take both in their options."""
    return " ".join(command).replace("-", "_")


def launcher_identity(environment: Mapping[str, str]) -> str | None:
    """A name for the launcher of this process, different from that of any other launcher.

    Checkpoints contain the name, so that a process that the launcher restarts finds its own ones.

    Args:
        environment: Of this process.

    Returns:
        Machine, process number and time of start; None if the launcher never restarts processes,
        or where the system does not tell the time of start (macOS): there, a process that is
        restarted needs `--resume`.
    """
    if "TORCHELASTIC_RUN_ID" not in environment:
        return None
    pid = os.getppid()
    try:
        # The 22nd field. The second, the program's name, may contain anything: count from behind.
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip()
    except OSError:
        return None
    return f"{socket.gethostname()} {boot} {pid} {fields[19]}"
