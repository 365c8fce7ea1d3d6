"""Measure every way to read one data set on one machine: `shardprep bench`."""
