"""Tars that another program wrote, made a set without a copy."""
