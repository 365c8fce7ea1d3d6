"""Shards of a URL, kept on the disk of this machine."""
