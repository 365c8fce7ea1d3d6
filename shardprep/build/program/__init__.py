"""Shards from a program that adds one utterance after the other."""
