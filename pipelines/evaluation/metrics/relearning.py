"""How soon a little fine-tuning brings back the forgotten rows that it does not show.

Knowledge that is hidden and not gone comes back fast, from some of the forgotten rows, from loosely
related text (Hu et al. 2024, arXiv 2406.13356) or from unrelated text (Łucki et al. 2024, arXiv
2409.18025). Beside it stands the retrain oracle, which has to learn it anew.
"""

from collections.abc import Mapping
from typing import NamedTuple

# Small beside finetune.learning_rate's 2e-4: the steps should uncover, and not teach anew.
LEARNING_RATE = 2e-5


class Relearning(NamedTuple):
    """A fine-tuning that may bring back what was forgotten; what is scored has a version of its own.

    All parameters are trained, or a LoRA of rank `rank` on all layers but the head.
    """

    name: str  # in `evaluation.robustness`, and before its scores
    learned: str  # the set whose rows are fine-tuned on
    words: str  # these rows, and what is unusual about the fine-tuning
    learning_rate: float = LEARNING_RATE
    rank: int | None = None
    version: int = 1

    def key(self, score: str) -> str:
        """Return the key of one of its scores in a score file."""
        return f"{self.name}.{score}"


HALF = "half of the forget set"
RELEARNINGS = (
    Relearning("relearn", "forget", HALF),
    Relearning("relearn_retain", "retain", "retained rows"),
    Relearning("relearn_general", "general", "rows of the general set"),
    Relearning("relearn_1e-5", "forget", f"{HALF} at half the learning rate", 1e-5),
    Relearning("relearn_1e-4", "forget", f"{HALF} at five times the learning rate", 1e-4),
    Relearning("relearn_lora", "forget", f"{HALF} by a LoRA", 1e-4, rank=16),
)
# Rows of another set than the forget set are as many as half of that, and no more than these.
MOST_LEARNED = 64
# The numbers of steps after which the rows that are not learned are scored.
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
