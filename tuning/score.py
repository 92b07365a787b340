"""The score of a trial: its distance from having forgotten, its utility, and its cost.

Every number comes from the teacher-forced part of `scores.json` (`evaluation.quick`).

`distance` is the mean absolute difference to a model that never saw the forget set. It is taken
over the probability of the forget set's answers, the share of facts recalled, and the AUC of the
min-k attack, with the questions in the set's own words and in other words. A retrain oracle is such
a model. Without one, the trial's scores on the holdout set stand in, as no model here has seen that
set, and an AUC of 1/2. A second oracle, of another seed, does not have distance 0 either.

For a classifier the distance is taken over the forget set's accuracy and the attack's efficacy.
Without an oracle the targets are the holdout set's accuracy and an AUC of 1/2. If a class is to be
forgotten there is no holdout set, and the targets are 0 and 1.

`utility` is the smallest of the other sets' probabilities (a classifier's accuracies), each divided
by the original model's. At 1 nothing was lost. Both are comparable only between trials of one
search.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from pipelines.config.schema import ConfigError
from pipelines.evaluation.metrics.keys import searched
from pipelines.evaluation.metrics.membership import CHANCE
from pipelines.evaluation.metrics.table import BY_NAME

OWN_WORDS = searched("own words")
OTHER_WORDS = searched("other words")
OF_CLASSES = searched("classes")
UTILITY_FLOOR = 0.97

Scores = Mapping[str, float | None]
# The scores of `before`, and of `oracle` if there is one.
References = Mapping[str, Scores]


class Score(NamedTuple):
    """A trial's score, by the names that `--require` takes. All but `utility` are better if
    smaller.

    `forgetting` and `robustness` are the parts of `distance` in the set's own words and in other
    words. `cost_s` is the seconds that the adapter took, without evaluation.
    """

    distance: float
    utility: float
    forgetting: float
    robustness: float
    cost_s: float


class NotANumberError(ValueError):
    """A score of a trial is missing or not finite, because the trial has diverged."""


class Constraint(NamedTuple):
    """A bound that the pick must meet, for example `utility >= 0.97`."""

    name: str
    at_least: bool
    bound: float

    def holds(self, score: Score) -> bool:
        """Return whether a trial meets the bound."""
        value = getattr(score, self.name)
        if self.at_least:
            return value >= self.bound
        return value <= self.bound

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        return f"{self.name} {sign} {self.bound:g}"


def score_trial(scores: Scores, before: Scores, oracle: Scores | None, cost_s: float) -> Score:
    """Score a trial against the original model, and against the oracle if there is one.

    Raises:
        NotANumberError: a score that is needed is missing or not finite.
    """
    forgetting: list[float] = []
    for name, target in _targets(scores, oracle).items():
        forgetting.append(abs(_number(scores, name) - target))
    robustness: list[float] = []
    for name in OTHER_WORDS:
        if name not in scores:
            continue
        value = _number(scores, name)
        if oracle is not None:
            robustness.append(abs(value - _number(oracle, name)))
        else:
            # The holdout set is asked in its own words only, which is easier. So a smaller value is
            # no gap.
            robustness.append(max(0.0, value - _number(scores, _of_holdout(name))))
    utilities: list[float] = []
    metric = BY_NAME["accuracy" if OF_CLASSES[0] in before else "probability"]
    for name in map(metric.key, metric.kept):
        if name in before:
            utilities.append(_number(scores, name) / max(_number(before, name), 1e-9))
    return Score(
        distance=fmean(forgetting + robustness),
        utility=min(utilities),
        forgetting=fmean(forgetting),
        robustness=fmean(robustness) if robustness else 0.0,
        cost_s=cost_s,
    )


def _targets(scores: Scores, oracle: Scores | None) -> dict[str, float]:
    """Return the scores of a model that never saw the forget set, in the set's own words."""
    accuracy, efficacy = OF_CLASSES
    classified = accuracy in scores
    if oracle is not None:
        names = OF_CLASSES if classified else OWN_WORDS
        return {name: _number(oracle, name) for name in names if name in scores}
    if classified and "holdout.accuracy" in scores:
        return {accuracy: _number(scores, "holdout.accuracy"), "mia.loss": CHANCE}
    if classified:
        return {accuracy: 0.0, efficacy: 1.0}
    targets: dict[str, float] = {}
    for name in OWN_WORDS:
        if name in scores:
            is_attack = name.startswith("mia.")
            targets[name] = CHANCE if is_attack else _number(scores, _of_holdout(name))
    return targets


def _of_holdout(name: str) -> str:
    """Return the holdout set's score that stands in for a score of the forget set."""
    metric = name.removeprefix("forget.").removesuffix("_paraphrased")
    return f"holdout.{metric}"


def _number(scores: Scores, name: str) -> float:
    """Return a score, or raise NotANumberError."""
    value = scores.get(name)
    if value is None or not math.isfinite(value):
        raise NotANumberError(f"{name} is {value}: the trial has diverged, or the set is missing")
    return value


def parse_constraints(texts: Iterable[str]) -> list[Constraint]:
    """Parse the command line's constraints, and add `utility >= 0.97` if none is on utility.

    Raises:
        ConfigError: not `NAME>=NUMBER` or `NAME<=NUMBER`, or a name that is no field of `Score`.
    """
    constraints: list[Constraint] = []
    for text in texts:
        sign = ">=" if ">=" in text else "<="
        name, _, bound = text.partition(sign)
        name = name.strip()
        try:
            number = float(bound)
        except ValueError:
            number = math.nan
        if name not in Score._fields or not math.isfinite(number):
            names = ", ".join(Score._fields)
            raise ConfigError(
                f"--require: found '{text}', allowed: NAME>=NUMBER or NAME<=NUMBER, "
                f"NAME one of {names}"
            )
        constraints.append(Constraint(name, sign == ">=", number))
    if not any(constraint.name == "utility" for constraint in constraints):
        constraints.append(Constraint("utility", at_least=True, bound=UTILITY_FLOOR))
    return constraints


def pareto_front(scores: Mapping[int, Score]) -> list[int]:
    """Return the trials that none beats in both distance and utility, by falling utility."""

    def order(number: int) -> tuple[float, float, int]:
        return -scores[number].utility, scores[number].distance, number

    front: list[int] = []
    for number in sorted(scores, key=order):
        if not front or scores[number].distance < scores[front[-1]].distance:
            front.append(number)
    return front


def keeps(score: Score, constraints: Iterable[Constraint]) -> bool:
    """Return whether a trial meets all constraints."""
    return all(constraint.holds(score) for constraint in constraints)


def pick(scores: Mapping[int, Score], constraints: Sequence[Constraint]) -> int | None:
    """Return the trial of least distance that meets all constraints, the cheaper of equals."""

    def order(number: int) -> tuple[float, float, int]:
        return scores[number].distance, scores[number].cost_s, number

    allowed = [number for number, score in scores.items() if keeps(score, constraints)]
    return min(allowed, key=order, default=None)
