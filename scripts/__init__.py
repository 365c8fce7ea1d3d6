"""What measures, tries and draws the project; run from its root as `python -m scripts.NAME`."""
