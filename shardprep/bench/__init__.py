"""Measure every way to read one data set on one machine: `shardprep bench`."""

from shardprep.errors import needs

with needs("torch"):
    import torch as _torch  # noqa: F401
