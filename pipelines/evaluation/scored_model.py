"""Which model is scored: one of the configuration, as it is or changed in memory.

The changes are what could bring back what a model has forgotten (`pipelines.evaluation.attacks`).
"""

from typing import NamedTuple

from pipelines.evaluation.metrics.keys import ROUNDINGS, Rounding
from pipelines.evaluation.metrics.relearning import STEPS


class Relearned(NamedTuple):
    """A relearning: so many steps of fine-tuning on half of the forget set."""

    steps: int


Change = Rounding | Relearned


class ScoredModel(NamedTuple):
    """A model by its name in the run, and what is changed once it is loaded."""

    name: str
    change: Change | None = None


# By their names in `evaluation.robustness`.
CHANGES: dict[str, Change] = {
    **{rounding.name: rounding for rounding in ROUNDINGS},
    "relearn": Relearned(STEPS[-1]),
}
