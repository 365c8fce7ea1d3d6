"""Every kind of hostile input, made when it is needed.

A kind is a function that forges a valid set in its folder. Beside it is the folder `outside/`,
where nothing may change. Its docstring is the line in SECURITY.md. A command that a kind tries to
run makes a file `canary`.
"""

from __future__ import annotations

from kinds import (
    datasets,
    indexes,
    manifests,
    members,
    ptfiles,
    recordings,
    sidecars,
    targets,
    tars,
)
from kinds.registry import KINDS, Canary, Kind

__all__ = [
    "KINDS",
    "Canary",
    "Kind",
    "datasets",
    "indexes",
    "manifests",
    "members",
    "ptfiles",
    "recordings",
    "sidecars",
    "targets",
    "tars",
]
