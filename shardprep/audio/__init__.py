"""Recordings: decoded, and made into log-mels by a recipe."""
