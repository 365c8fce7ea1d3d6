"""Pack a source into shards: plan, write, resume, publish."""
