"""Train and use a speaker model on the shards that `shardprep` makes."""
