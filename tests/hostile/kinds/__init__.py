"""Every kind of hostile input that is tried, made when it is needed.

A kind is a function that spoils a valid set within its folder, which also holds `outside/`, where
nothing may change. Its docstring is its line in SECURITY.md. What it tries to run makes a file
`canary`.
"""

from __future__ import annotations

from kinds import datasets, indexes, manifests, members, ptfiles, targets, tars
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
    "targets",
    "tars",
]
