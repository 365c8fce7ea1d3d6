"""Verify a shard set and repair it."""
