"""How several models name a speaker together."""
