"""The processes of a launch: start, meet, agree, watch, stop."""
