"""What commands offer for recordings."""
