"""A set that is there already: is it up to date, and what can be appended to it."""
