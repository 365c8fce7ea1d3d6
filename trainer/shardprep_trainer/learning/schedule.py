"""What depends on the step alone: learning rate, margin and seed. Nothing of it is saved."""

from __future__ import annotations

import hashlib
import math


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Learning rate of an optimiser step: linear warm-up, then half a cosine down to 0.

    Args:
        step: Steps taken before this one, 0 to total_steps - 1.
        peak: Learning rate at the end of the warm-up.
        warmup_steps: Steps of the warm-up; its last step has the peak.
        total_steps: Steps of the run, more than warmup_steps.

    Returns:
        peak * (step + 1) / warmup_steps during the warm-up, then
        peak * (1 + cos(pi * p)) / 2 where p is the share of the remaining steps already taken.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    share = (step - warmup_steps) / (total_steps - warmup_steps)
    return peak * 0.5 * (1.0 + math.cos(math.pi * share))


def margin(step: int, *, final: float, growth_steps: int) -> float:
    """Margin of an optimiser step: rises linearly from 0 to `final`, then stays constant.

    Args:
        step: Steps taken before this one.
        final: Margin at the end.
        growth_steps: Steps until `final`; 0 for no growth.
    """
    return final * min(1.0, step / growth_steps) if growth_steps else final


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of torch's generators for one optimiser step on one rank, 0 to 2**63 - 1.

    It is a hash of the arguments. Dropout is then a function of the step, and a resumed run is
    exact although no generator's state is saved, at any number of processes.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
