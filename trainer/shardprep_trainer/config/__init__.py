"""What a run is told: fields, command line, checks."""
