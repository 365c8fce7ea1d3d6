"""What a run leaves on the disk, and what opens it again."""
