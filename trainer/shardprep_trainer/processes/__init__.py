"""The processes of a launch: they start, meet, agree, watch one another and stop."""
