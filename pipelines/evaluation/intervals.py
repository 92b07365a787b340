"""How far off a score may be because few rows were scored: 95 % bootstrap intervals over rows.

Rows of each set are drawn with replacement, the same ones for every model, so that the interval of
a difference knows what a row is to both (the percentile interval of Efron and Tibshirani 1993, An
Introduction to the Bootstrap, ch. 13). It says nothing of other seeds of training: several oracles
and their spread do.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipelines.evaluation.metrics.sample import Sample
from pipelines.evaluation.metrics.summary import Scores
from pipelines.evaluation.scored_model import Beside, ScoredModel, is_oracle

if TYPE_CHECKING:
    from pipelines.evaluation.scorer import Samples

    SamplesByModel = Mapping[ScoredModel, Samples]

# As many resamples as take about half a minute, within limits: many rows make narrow intervals,
# of which a few resamples tell enough.
MOST, FEWEST = 400, 40
ROWS_IN_ALL = 1_000_000
TAILS = (2.5, 97.5)  # percent
# Of the resamples that give a number: with fewer, a score is rather one of few of its rows.
MIN_FINITE = 0.9

Intervals = dict[str, dict[str, tuple[float, float]]]  # by model or difference, then by score


def intervals_of(
    samples: "SamplesByModel", entries_of: Callable[["SamplesByModel"], dict[str, Scores]]
) -> Intervals:
    """Return the interval of each score of each model, and of its difference from the oracle's.

    A difference goes by the name `after - oracle`.

    Args:
        entries_of: the entries that some samples make, by model, among them `oracle` where any is.
    """
    # Those of changed models, rounded or relearned, are in no entry here.
    compared = {
        model: rows
        for model, rows in samples.items()
        if model.change is None or isinstance(model.change, Beside)
    }
    keys = _keys_by_set(compared)
    # A set's draws depend on its name alone, not on the order in which samples arrived.
    generators = {name: np.random.default_rng(zlib.crc32(name.encode())) for name in keys}
    rows = sum(len(of_model) for of_model in compared.values())
    resamples = min(MOST, max(FEWEST, ROWS_IN_ALL // max(rows, 1)))
    values: dict[str, dict[str, list[float]]] = {}
    for _ in range(resamples):
        drawn: list[tuple[str, int]] = []
        for name, of_set in keys.items():
            indices = generators[name].integers(len(of_set), size=len(of_set))
            drawn += [of_set[index] for index in indices]
        entries = _with_differences(entries_of(_resampled(compared, drawn)))
        for name, entry in entries.items():
            for score, value in entry.items():
                if value is not None:
                    values.setdefault(name, {}).setdefault(score, []).append(value)
    intervals: Intervals = {}
    for name, entry in values.items():
        intervals[name] = {}
        for score, drawn_values in entry.items():
            if len(drawn_values) >= MIN_FINITE * resamples:
                low, high = np.percentile(drawn_values, TAILS)
                intervals[name][score] = (round(float(low), 4), round(float(high), 4))
    return intervals


class Chance(NamedTuple):
    """What chance alone may do to the differences from the oracle."""

    intervals: Mapping[str, Sequence[float]]  # of each difference

    @classmethod
    def of(cls, scores: Mapping[str, Any]) -> "Chance":
        """Read it off the content of a scores.json. An older one has no intervals."""
        return cls(scores.get("intervals", {}).get("after - oracle", {}))

    def explains(self, score: str) -> bool:
        """Return whether no difference lies within the interval of a score's difference."""
        if score not in self.intervals:
            return False
        low, high = self.intervals[score]
        return low <= 0 <= high

    def times_as_many(self, score: str, difference: float) -> float:
        """Return how many times the rows would tell a difference from none, if it stays.

        An interval is as wide as 1 / sqrt(rows), with as many times the rows of each set.
        """
        low, high = self.intervals[score]
        return max(1.1, ((high - low) / 2 / difference) ** 2)


def _keys_by_set(samples: "SamplesByModel") -> dict[str, list[tuple[str, int]]]:
    """Return the rows that the models themselves were scored on, by set."""
    keys: dict[str, set[tuple[str, int]]] = {}
    for model, rows in samples.items():
        if model.change is None:
            for key in rows:
                keys.setdefault(key[0], set()).add(key)
    return {name: sorted(keys[name]) for name in sorted(keys)}


def _resampled(
    samples: "SamplesByModel", drawn: Sequence[tuple[str, int]]
) -> dict[ScoredModel, "Samples"]:
    """Return each model's samples of the drawn rows, each draw as a row of its own."""
    resampled: dict[ScoredModel, dict[tuple[str, int], Sample]] = {}
    for model, rows in samples.items():
        own = resampled[model] = {}
        for index, key in enumerate(drawn):
            if key in rows:
                own[key[0], index] = rows[key]
    return resampled


def _with_differences(entries: Mapping[str, Scores]) -> dict[str, Scores]:
    """Add what each model's scores differ from the oracle's by, where there is one."""
    oracle = entries.get("oracle", {})
    differences: dict[str, Scores] = {}
    for name, entry in entries.items():
        difference: Scores = {}
        for score, value in entry.items():
            target = oracle.get(score)
            if value is not None and target is not None:
                difference[score] = value - target
        if difference and not is_oracle(name):
            differences[f"{name} - oracle"] = difference
    return {**entries, **differences}
