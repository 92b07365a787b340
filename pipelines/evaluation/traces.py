"""Traces that the forget set's mean scores do not show.

Single rows or groups that stand where the original has them, what a little work brings back, and
rows of earlier requests that a later one has brought back.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence

from pipelines.evaluation.metrics.keys import IN_CONTEXT, RESCORINGS
from pipelines.evaluation.metrics.membership import CHANCE
from pipelines.evaluation.metrics.metric import Metric
from pipelines.evaluation.metrics.relearning import RELEARNINGS, STEPS
from pipelines.evaluation.metrics.table import BY_NAME, JUDGED
from pipelines.evaluation.rule import RULE

Entry = Mapping[str, float | None]  # a model's scores by their keys


def hidden_traces(before: Entry, after: Entry, oracle: Entry | None) -> list[str]:
    """Return each kind of trace that is left of the forget set, as a clause."""
    traces: list[str] = []
    if remembered := _remembered(after):
        traces.append(f"not row by row: {remembered}")
    if brought_back := [*_by_rescoring(before, after, oracle), *_by_relearning(after, oracle)]:
        traces.append(f"it comes back by {join_words(brought_back)}")
    return traces


def _remembered(after: Entry) -> str:
    """Say what single rows or groups of them still have of the original, '' where it is little."""
    share = after.get(BY_NAME["remembered_rows"].key("forget")) or 0.0
    if share >= RULE.remembered_rows:
        return f"{percent(share)} of the rows are nearer to the original"
    share = after.get(BY_NAME["remembered_rows_worst_group"].key("forget")) or 0.0
    if share >= RULE.remembered_in_group:
        return f"of one group {percent(share)} of the rows are nearer to the original"
    share = after.get(BY_NAME["untouched_groups"].key("forget")) or 0.0
    if share > 0:
        return f"of the groups of rows {100 * share:.2g} % stand where the original has them"
    return ""


def _by_rescoring(before: Entry, after: Entry, oracle: Entry | None) -> list[str]:
    """Name the roundings, and what is shown before a question, that bring the forget set back."""
    found: list[str] = []
    for rescoring in RESCORINGS:
        # Examples make any answer of their form likelier: only an oracle says by how much.
        if oracle is None and rescoring == IN_CONTEXT:
            continue
        for metric in JUDGED:
            name = metric.key("forget")
            key = f"{rescoring.name}.{name}"
            old, new = before.get(name), after.get(key)
            target = oracle.get(key) if oracle else stand_in(metric, before)
            if not metric.decisive or old is None or new is None or target is None:
                continue
            if abs(old - target) >= RULE.min_gap and abs(new - target) >= abs(new - old):
                found.append(rescoring.words)
                break
    return found


def _by_relearning(after: Entry, oracle: Entry | None) -> list[str]:
    """Name the relearnings that bring the forget set back sooner than to the oracle."""
    found: list[str] = []
    for relearning in RELEARNINGS:
        key = relearning.key("steps")
        steps = after.get(key)
        if not oracle or key not in oracle or steps is None:
            continue
        of_oracle = oracle[key]
        never = len(STEPS)
        place = never if of_oracle is None else bisect_left(STEPS, of_oracle)
        if place - bisect_left(STEPS, steps) >= RULE.sooner:
            target = "more than can be tried" if of_oracle is None else f"{of_oracle:g}"
            words = f"relearning from {relearning.words}"
            found.append(f"{words} (steps: {steps:g}, the oracle: {target})")
    return found


def returned(before: Entry, after: Entry, oracle: Entry | None) -> list[str]:
    """Name the decisive scores by which this run brought rows of earlier requests back.

    Before it they were forgotten: what it left as it was, or what an oracle has too, is not back.
    """
    found: list[str] = []
    for metric in JUDGED:
        name = metric.key("earlier")
        old, new = before.get(name), after.get(name)
        if not metric.of_set or not metric.decisive or old is None or new is None:
            continue
        target = oracle.get(name) if oracle else None
        most = old if target is None else max(old, target)
        if new - most > RULE.remains:
            found.append(f"{metric.decisive} {most:.2f} to {new:.2f}")
    return found


def stand_in(metric: Metric, before: Entry) -> float | None:
    """Return a score's target without an oracle; None where only an oracle can tell."""
    if metric.unit == "AUC":
        return CHANCE
    return before.get(metric.key("holdout")) if metric.of_set else None


def percent(share: float) -> str:
    """Round down, so that 94.9 % never reads as the 95 % it missed."""
    # 0.29 * 100 is a hair below 29 in floating point, and would read as 28.
    return f"{math.floor(share * 100 + 1e-9)} %"


def join_words(parts: Sequence[str]) -> str:
    *others, last = parts
    return f"{', '.join(others)} and {last}" if others else last
