"""What a trial is worth: how far it is from having forgotten, what it has kept, what it cost.

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
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from pipelines.config.schema import ConfigError, UnlearnConfig
from pipelines.evaluation.metrics.keys import searched
from pipelines.evaluation.metrics.membership import CHANCE
from pipelines.evaluation.metrics.table import BY_NAME

OWN_WORDS = searched("own words")
OTHER_WORDS = searched("other words")
OF_CLASSES = searched("classes")
UTILITY_FLOOR = 0.97

Scores = Mapping[str, float | None]


class Score(NamedTuple):
    """One trial's values, in the words of `--require`. All but `utility` are better when they are smaller.

    `robustness` is the part of `distance` that is asked in other words; `cost_s` is the seconds that finding the
    adapter took, without evaluation.
    """

    distance: float
    utility: float
    forgetting: float
    robustness: float
    cost_s: float


class NotANumberError(ValueError):
    """A trial's score is not finite: it has diverged, and can never win."""


class Constraint(NamedTuple):
    """A bound that the pick must keep, for example `utility >= 0.97`."""

    name: str
    at_least: bool
    bound: float

    def holds(self, score: Score) -> bool:
        """Whether a trial keeps the bound."""
        value = getattr(score, self.name)
        return value >= self.bound if self.at_least else value <= self.bound

    def __str__(self) -> str:
        return f"{self.name} {'>=' if self.at_least else '<='} {self.bound:g}"


def score_trial(scores: Scores, before: Scores, oracle: Scores | None, cost_s: float) -> Score:
    """A trial's value from its scores, the original model's, and the oracle's where there is one.

    Raises:
        NotANumberError: a score that is needed is missing or not finite.
    """
    own = [
        abs(_number(scores, name) - target) for name, target in _never_saw(scores, oracle).items()
    ]
    other = [_gap_in_other_words(name, scores, oracle) for name in OTHER_WORDS if name in scores]
    metric = BY_NAME["accuracy" if OF_CLASSES[0] in before else "probability"]
    kept = [
        _number(scores, name) / max(_number(before, name), 1e-9)
        for name in map(metric.key, metric.kept)
        if name in before
    ]
    parts = [*own, *other]
    return Score(_mean(parts), min(kept), _mean(own), _mean(other) if other else 0.0, cost_s)


def check_sets(cfg: UnlearnConfig) -> None:
    """Refuse a search whose trials could not be scored.

    Raises:
        ConfigError: names the set that is missing.
    """
    data, has_oracle = cfg.data, cfg.evaluation.oracle is not None
    if cfg.task == "causal_lm" and data.holdout is None and not has_oracle:
        raise ConfigError("data.holdout: missing, required by a search without evaluation.oracle")
    if cfg.task != "causal_lm" and data.general is None and (has_oracle or data.holdout is None):
        raise ConfigError(
            "data.general: missing, required by a search that scores classifiers by the attack on them"
        )


def _never_saw(scores: Scores, oracle: Scores | None) -> dict[str, float]:
    """What a model that never saw the forget set scores, by name, in the forget set's own words."""
    accuracy, efficacy = OF_CLASSES
    if oracle is not None:
        return {
            name: _number(oracle, name)
            for name in (OF_CLASSES if accuracy in scores else OWN_WORDS)
            if name in scores
        }
    if accuracy not in scores:
        of_holdout = {name: f"holdout.{_metric(name)}" for name in OWN_WORDS if name in scores}
        return {
            name: CHANCE if name.startswith("mia.") else _number(scores, own)
            for name, own in of_holdout.items()
        }
    if "holdout.accuracy" in scores:
        return {accuracy: _number(scores, "holdout.accuracy"), "mia.loss": CHANCE}
    return {accuracy: 0.0, efficacy: 1.0}


def _gap_in_other_words(name: str, scores: Scores, oracle: Scores | None) -> float:
    """The holdout set is asked in its own words only, which is easier: without an oracle, less than that is no gap."""
    value = _number(scores, name)
    if oracle is not None:
        return abs(value - _number(oracle, name))
    return max(0.0, value - _number(scores, f"holdout.{_metric(name)}"))


def _metric(name: str) -> str:
    return name.removeprefix("forget.").removesuffix("_paraphrased")


def _number(scores: Scores, name: str) -> float:
    value = scores.get(name)
    if value is None or not math.isfinite(value):
        raise NotANumberError(f"{name} is {value}: the trial has diverged, or the set is missing")
    return value


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def parse_constraints(texts: Iterable[str]) -> list[Constraint]:
    """Constraints as the command line has them; `utility >= 0.97` where nothing is said of utility.

    Raises:
        ConfigError: not `NAME>=NUMBER` or `NAME<=NUMBER`, or a name that is no field of `Score`.
    """
    found = [_parse(text) for text in texts]
    if not any(constraint.name == "utility" for constraint in found):
        found.append(Constraint("utility", at_least=True, bound=UTILITY_FLOOR))
    return found


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
    """Trials that no other trial beats in both distance and utility, by falling utility."""
    front: list[int] = []
    for number in sorted(scores, key=lambda n: (-scores[n].utility, scores[n].distance, n)):
        if not front or scores[number].distance < scores[front[-1]].distance:
            front.append(number)
    return front


def pick(scores: Mapping[int, Score], constraints: Iterable[Constraint]) -> int | None:
    """The trial of least distance among those that keep all constraints; the cheaper one of equals. None: none does."""
    wanted = list(constraints)
    allowed = [
        number for number, score in scores.items() if all(own.holds(score) for own in wanted)
    ]
    return min(allowed, key=lambda n: (scores[n].distance, scores[n].cost_s, n), default=None)
