"""Which model is scored, and how: as it is, changed in memory, or beside a reference model.

The changes are what could bring back what a model has forgotten (`pipelines.evaluation.attacks`).
"""

from typing import NamedTuple

from pipelines.evaluation.metrics.keys import RESCORINGS, InContext, Rounding
from pipelines.evaluation.metrics.relearning import RELEARNINGS, STEPS, Relearning


class Relearned(NamedTuple):
    """A relearning: so many steps of fine-tuning on its rows."""

    steps: int
    by: Relearning = RELEARNINGS[0]


class Beside(NamedTuple):
    """A comparison, token by token, with another model of the run."""

    reference: str


Change = Rounding | InContext | Relearned | Beside


class ScoredModel(NamedTuple):
    """A model by its name in the run, and what is done with it once it is loaded."""

    name: str
    change: Change | None = None


# By their names in `evaluation.robustness`.
CHANGES: dict[str, Change] = {
    **{rescoring.name: rescoring for rescoring in RESCORINGS},
    **{relearning.name: Relearned(STEPS[-1], relearning) for relearning in RELEARNINGS},
}
QUANTISED_SETS = ("forget", "retain")  # sets that models of rounded weights are scored on


def oracle_names(number: int) -> list[str]:
    """Return the names of a run's oracles: `oracle` alone, or `oracle 1`, `oracle 2`, ..."""
    if number == 1:
        return ["oracle"]
    return [f"oracle {index}" for index in range(1, number + 1)]


def is_oracle(name: str) -> bool:
    """Return whether a model of this name is a retrain oracle."""
    return name.split(" ")[0] == "oracle"
