"""Learning rate over steps: linear warm-up, then a cosine (authors' scheduler.py; paper, Tables 12 and 13)."""

import math


def warmup_cosine(step: int, *, warmup_steps: int, total_steps: int, min_ratio: float = 0.0) -> float:
    """Factor on the base rate before the update of `step` (0-based): (step + 1) / w, then down to min_ratio.

    As in the authors' code the last warm-up step and the first cosine step both have the full rate, and the last step
    stands just above the end.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
