"""Sources that are lists of matrices: CSV, JSON Lines, Kaldi."""
