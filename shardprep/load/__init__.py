"""Batches for training and evaluation: order, segments, damage, prefetching."""

from shardprep.errors import needs

with needs("torch"):
    import torch as _torch  # noqa: F401
