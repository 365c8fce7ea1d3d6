"""The machine that a benchmark runs on: processor, cores, memory, versions."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

from shardprep.system import usable_cores


@dataclass(frozen=True)
class Machine:
    """The machine of a measurement, the date, and the versions of Python and the libraries."""

    cpu: str
    cores: int
    date: str
    versions: dict[str, str]


def machine() -> Machine:
    """This machine, today, with the libraries that the results depend on."""
    packages = ("shardprep", "torch", "numpy", "webdataset", "zstandard")
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    return Machine(cpu_name(), usable_cores(), date.today().isoformat(), versions)


def cpu_name() -> str:
    """The processor's name; its architecture where the system does not tell the name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def free_memory() -> int:
    """Bytes of memory that a process can still get; the page cache counts as free."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")
