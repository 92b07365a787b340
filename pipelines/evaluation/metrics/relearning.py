"""How soon a little fine-tuning on some forgotten rows brings back the others.

Knowledge that is hidden and not gone comes back fast. Beside it stands the retrain oracle, which
has to learn it anew.
"""

from collections.abc import Mapping

# The numbers of steps after which the held-out half is scored.
STEPS = (0, 1, 2, 5, 10, 20, 50)
# Two passes over the same rows in other batches differ by fp32's rounding: that much is not lost.
ROUNDING = 1e-5


def steps_to_relearn(curve: Mapping[int, float | None], original: float | None) -> int | None:
    """Return the first step whose probability is halfway from step 0's to the original model's.

    0 where nothing had been lost; None where it never gets there, or a probability is missing.
    """
    start = curve.get(0)
    if start is None or original is None:
        return None
    if start >= original * (1 - ROUNDING):
        return 0
    halfway = (start + original) / 2
    for step in sorted(curve):
        probability = curve[step]
        if probability is not None and probability >= halfway:
            return step
    return None
