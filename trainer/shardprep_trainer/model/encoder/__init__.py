"""Encoders, from mel frames to frames of another width: ours, and those that a user names."""
