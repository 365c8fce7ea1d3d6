"""In which order an epoch comes: pure functions of (seed, epoch, position)."""
