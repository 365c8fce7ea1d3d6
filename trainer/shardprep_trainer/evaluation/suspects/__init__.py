"""Training utterances whose label looks wrong."""
