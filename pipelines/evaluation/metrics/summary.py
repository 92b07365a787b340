"""From the samples of one model to its entry in scores.json, by the table of metrics.

Absent: a metric of a set of which no row carries the number, and the attacks when forget or holdout
has no row. None: what needs an oracle that is not there (`mia.reference`, `privleak`,
`forget_quality`), `model_utility` when one of its six parts is missing, an attack without a score
on one side, and any value that is not finite. A row without a number is left out of the mean; a row
whose number is NaN is not, and makes the metric None.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from statistics import fmean

from pipelines.config.data import SET_NAMES
from pipelines.evaluation.metrics.formulas import RowsBySet, probability_of
from pipelines.evaluation.metrics.likelihood import Answer, TokenStatistics
from pipelines.evaluation.metrics.relearning import RELEARNINGS, Relearning, steps_to_relearn
from pipelines.evaluation.metrics.sample import Sample
from pipelines.evaluation.metrics.table import METRICS

Scores = dict[str, float | None]


def sample_scores(
    statistics: TokenStatistics, answer_text: str, ends: Sequence[int] = (-1,)
) -> dict[str, float | list[float] | None]:
    """Return the numbers of a row's sample that its answer's tokens give.

    `ends` are the places of EOS among the tokens: a conversation has several.

    Numbers that leave EOS out are None when EOS is the only token.

    Raises:
        ValueError: there is no labelled token at all.
    """
    answer = Answer(statistics, answer_text, ends)
    scores: dict[str, float | list[float] | None] = {"tokens": len(statistics.log_probability)}
    for metric in METRICS:
        if metric.of_answer is not None:
            scores[metric.reads or metric.name] = metric.of_answer(answer)
    return scores


def summarise(samples: Sequence[Sample], oracle: Sequence[Sample] | None = None) -> Scores:
    """Return `set.metric` and the metrics of the whole model, each a finite number or None.

    `oracle` holds the samples of the model retrained without the forget set.

    Raises:
        ValueError: the oracle's forget or holdout samples are of other rows.
    """
    model_rows = _by_set(samples)
    oracle_rows = None if oracle is None else _by_set(oracle)
    scores: Scores = {}
    for set_name, rows in model_rows.items():
        for metric in METRICS:
            value = metric.of_set(rows) if metric.of_set is not None else None
            if value is not None:
                scores[f"{set_name}.{metric.name}"] = _finite(value)
    for metric in METRICS:
        if metric.of_model is not None and metric.applies(model_rows, oracle_rows):
            scores[metric.name] = _finite(metric.of_model(model_rows, oracle_rows))
    return scores


def relearn_scores(
    curve: Mapping[int, Sequence[Sample]],
    original: Sequence[Sample] | None,
    by: Relearning = RELEARNINGS[0],
) -> Scores:
    """Return each `relearn.*` metric, those of a curve after N steps as `relearn.probability.N`.

    Args:
        curve: samples of the forget rows that are not learned, by the steps that were taken.
        original: the same rows under the model before unlearning, for `relearn.steps`.
        by: the relearning, whose name stands before its scores.
    """
    scores: Scores = {}
    for metric in METRICS:
        if metric.of_curve is None or metric.of_curve is steps_to_relearn:
            continue
        for step, rows in curve.items():
            value = metric.of_curve(rows)
            if value is not None:
                scores[by.key(f"{metric.name.partition('.')[2]}.{step}")] = _finite(value)
    if original is not None:
        probabilities = {step: scores.get(by.key(f"probability.{step}")) for step in curve}
        target = _finite(probability_of("loss")(original))
        scores[by.key("steps")] = steps_to_relearn(probabilities, target)
    return scores


def mean_scores(entries: Sequence[Scores]) -> Scores:
    """Return each score's mean over some entries, None where one of them has no number."""
    means: Scores = {}
    for key in dict.fromkeys(chain(*entries)):
        values = _values(key, entries)
        # A mean over some of the oracles alone would not compare with another model's.
        means[key] = fmean(values) if len(values) == len(entries) else None
    return means


def spread(entries: Sequence[Scores]) -> dict[str, float]:
    """Return each score's largest value minus its smallest, where all entries have a number."""
    differences: dict[str, float] = {}
    for key in dict.fromkeys(chain(*entries)):
        values = _values(key, entries)
        if len(values) == len(entries):
            differences[key] = max(values) - min(values)
    return differences


def _values(key: str, entries: Sequence[Scores]) -> list[float]:
    return [value for entry in entries if (value := entry.get(key)) is not None]


def _by_set(samples: Sequence[Sample]) -> RowsBySet:
    rows: dict[str, list[Sample]] = {name: [] for name in SET_NAMES}
    for sample in samples:
        rows[sample["set_name"]].append(sample)
    return rows


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
