"""Scores of trials for properties to hold of."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

Scored = tuple[np.ndarray, np.ndarray]


@st.composite
def scored_trials(draw: st.DrawFn) -> Scored:
    """Scores with many ties, and at least one trial of each kind."""
    targets = draw(st.lists(st.integers(-4, 4), min_size=1, max_size=15))
    others = draw(st.lists(st.integers(-4, 4), min_size=1, max_size=15))
    pairs = [(score, True) for score in targets] + [(score, False) for score in others]
    pairs = draw(st.permutations(pairs))
    return np.array([s for s, _ in pairs], float), np.array([t for _, t in pairs])
