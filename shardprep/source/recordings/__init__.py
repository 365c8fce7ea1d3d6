"""Sources that are recordings."""
