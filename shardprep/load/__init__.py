"""Batches for training and evaluation: order, segments, damage, prefetching."""
