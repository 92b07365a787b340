"""What a trial is worth: its distance from having forgotten, the utility it keeps, and its cost.

Every number comes from the teacher-forced part of `scores.json` (`evaluation.quick`). `distance` is the mean absolute
difference to a model that never saw the forget set, over the forget set's answers in its own words and asked in other
words: their probability, the share of facts recalled, and the AUC of the min-k attack. With a retrain oracle its own
scores are that model's; without one the trial's own holdout set stands in, which no model here has seen, and an AUC of
1/2. Even a second oracle, of another seed, is not at 0.

Of a classifier it is the forget set's accuracy and the attack's efficacy; without an oracle the holdout set's accuracy
and an AUC of 1/2 are aimed at or, where there is no holdout set since a class must go, 0 and 1.

`utility` is the smallest of the kept sets' probabilities (a classifier's accuracies), each in units of the original
model's: 1 means that nothing was lost. Both are comparable between trials of one search alone.
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
References = Mapping[str, Scores]  # `before`, and `oracle` where there is one


class Score(NamedTuple):
    """One trial's values, by the names that `--require` takes. All but `utility` are better when they are smaller.

    `robustness` is the part of `distance` that is asked in other words; `cost_s` is the seconds that finding the
    adapter took, without evaluation.
    """

    distance: float
    utility: float
    forgetting: float
    robustness: float
    cost_s: float


class NotANumberError(ValueError):
    """A trial's score is missing or not finite: it has diverged, and can never win."""


class Constraint(NamedTuple):
    """A bound that the pick must keep, for example `utility >= 0.97`."""

    name: str
    at_least: bool
    bound: float

    def holds(self, score: Score) -> bool:
        """Return whether a trial keeps the bound."""
        value = getattr(score, self.name)
        return value >= self.bound if self.at_least else value <= self.bound

    def __str__(self) -> str:
        return f"{self.name} {'>=' if self.at_least else '<='} {self.bound:g}"


def score_trial(scores: Scores, before: Scores, oracle: Scores | None, cost_s: float) -> Score:
    """Score a trial against the original model, and against the oracle where there is one.

    Raises:
        NotANumberError: a score that is needed is missing or not finite.
    """
    forgetting: list[float] = []
    for name, target in _targets(scores, oracle).items():
        forgetting.append(abs(_number(scores, name) - target))
    robustness: list[float] = []
    for name in OTHER_WORDS:
        if name in scores:
            robustness.append(_gap_in_other_words(name, scores, oracle))
    kept: list[float] = []
    metric = BY_NAME["accuracy" if OF_CLASSES[0] in before else "probability"]
    for name in map(metric.key, metric.kept):
        if name in before:
            kept.append(_number(scores, name) / max(_number(before, name), 1e-9))
    return Score(
        distance=fmean(forgetting + robustness),
        utility=min(kept),
        forgetting=fmean(forgetting),
        robustness=fmean(robustness) if robustness else 0.0,
        cost_s=cost_s,
    )


def _targets(scores: Scores, oracle: Scores | None) -> dict[str, float]:
    """Return the scores that a model which never saw the forget set would have, asked in the set's own words."""
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


def _gap_in_other_words(name: str, scores: Scores, oracle: Scores | None) -> float:
    value = _number(scores, name)
    if oracle is not None:
        return abs(value - _number(oracle, name))
    # The holdout set is asked in its own words only, which is easier: a smaller value is no gap.
    return max(0.0, value - _number(scores, _of_holdout(name)))


def _of_holdout(name: str) -> str:
    metric = name.removeprefix("forget.").removesuffix("_paraphrased")
    return f"holdout.{metric}"


def _number(scores: Scores, name: str) -> float:
    value = scores.get(name)
    if value is None or not math.isfinite(value):
        raise NotANumberError(f"{name} is {value}: the trial has diverged, or the set is missing")
    return value


def parse_constraints(texts: Iterable[str]) -> list[Constraint]:
    """Parse the command line's constraints, and add `utility >= 0.97` where none is on utility.

    Raises:
        ConfigError: not `NAME>=NUMBER` or `NAME<=NUMBER`, or a name that is no field of `Score`.
    """
    constraints = list(map(_parse, texts))
    if not any(constraint.name == "utility" for constraint in constraints):
        constraints.append(Constraint("utility", at_least=True, bound=UTILITY_FLOOR))
    return constraints


def _parse(text: str) -> Constraint:
    sign = ">=" if ">=" in text else "<="
    name, _, bound = (part.strip() for part in text.partition(sign))
    try:
        number = float(bound)
    except ValueError:
        number = math.nan
    if name not in Score._fields or not math.isfinite(number):
        names = ", ".join(Score._fields)
        raise ConfigError(
            f"--require: found '{text}', allowed: NAME>=NUMBER or NAME<=NUMBER, NAME one of {names}"
        )
    return Constraint(name, sign == ">=", number)


def pareto_front(scores: Mapping[int, Score]) -> list[int]:
    """Return the trials that no other trial beats in both distance and utility, by falling utility."""

    def order(number: int) -> tuple[float, float, int]:
        return -scores[number].utility, scores[number].distance, number

    front: list[int] = []
    for number in sorted(scores, key=order):
        if not front or scores[number].distance < scores[front[-1]].distance:
            front.append(number)
    return front


def keeps(score: Score, constraints: Iterable[Constraint]) -> bool:
    """Return whether a trial keeps all constraints."""
    return all(constraint.holds(score) for constraint in constraints)


def pick(scores: Mapping[int, Score], constraints: Sequence[Constraint]) -> int | None:
    """Return the trial of least distance that keeps all constraints, the cheaper of equals, or None."""

    def order(number: int) -> tuple[float, float, int]:
        return scores[number].distance, scores[number].cost_s, number

    allowed = [number for number, score in scores.items() if keeps(score, constraints)]
    return min(allowed, key=order, default=None)
