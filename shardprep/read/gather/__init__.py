"""Fill a batch of segments, by codec."""
