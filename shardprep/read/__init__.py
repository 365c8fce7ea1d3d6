"""Open a shard set and read it through memory maps."""
