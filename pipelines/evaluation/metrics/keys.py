"""The keys of a score file, and what the table of metrics says of them.

A key is a set and a metric (`forget.loss`), a metric of the whole model (`mia.loss`, `privleak`),
one of a model that was relearned for some steps (`relearn.probability.5`, and the same on other
rows: `relearn_retain.probability.5`), or any of the first of rows that are scored once more: with
rounded weights (`quantised_4bit.forget.loss`), or behind others (`in_context.forget.loss`).
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from pipelines.config.data import SET_NAMES
from pipelines.evaluation.metrics.metric import Metric
from pipelines.evaluation.metrics.relearning import RELEARNINGS
from pipelines.evaluation.metrics.table import BY_NAME, METRICS


class Rounding(NamedTuple):
    """A rounding of a model's weights; what is scored then has a version of its own."""

    name: str
    label: str
    words: str  # what the verdict says was done
    bits: int
    is_normal: bool = False  # NF4, whose values are quantiles of a normal distribution
    version: int = 1


ROUNDINGS = (
    Rounding("quantised_8bit", "Rounded to 8 bits", "rounding to 8 bits", bits=8),
    Rounding("quantised_4bit", "Rounded to 4 bits", "rounding to 4 bits", bits=4),
    Rounding("quantised_nf4", "Rounded to NF4", "rounding to NF4", bits=4, is_normal=True),
)


class InContext(NamedTuple):
    """Forget questions behind retained ones with their answers, which has a version of its own.

    What a model was only taught not to say may come back in a context of answers: after the
    in-context attack of Lynch et al. 2024 (arXiv 2402.16835), with retained rows as its context.

    `examples` are shown, or as many as there are, of at most `drawn` retained rows: some may be plain
    texts or conversations, which are no examples.
    """

    name: str = "in_context"
    label: str = "Behind 4 retained answers"
    words: str = "4 retained answers before the question"
    examples: int = 4
    drawn: int = 64
    version: int = 1


IN_CONTEXT = InContext()
# What scores rows of some sets once more.
RESCORINGS = (*ROUNDINGS, IN_CONTEXT)


# What a key begins with, in the terminal's order, and its words there.
TERMINAL_GROUPS = {
    "forget": "forget",
    "earlier": "earlier requests",
    "mia": "membership inference, AUC",
    "retain": "retain",
    "general": "general",
    "neighbours": "neighbours",
    "": "",
}


def metric_of(key: str) -> Metric:
    """Return the metric of a score file's key, whatever was done to the model.

    Raises:
        KeyError: the table has no such metric.
    """
    head, _, rest = key.partition(".")
    if any(head == rescoring.name for rescoring in RESCORINGS):
        return metric_of(rest)
    if head in SET_NAMES:
        return BY_NAME[rest]
    if any(head == relearning.name for relearning in RELEARNINGS):
        # The table has one name for all of them. Behind it there may be the steps.
        return BY_NAME[RELEARNINGS[0].key(rest.partition(".")[0])]
    return BY_NAME[key]


def versions(models: Iterable[Mapping[str, float | None]]) -> dict[str, int]:
    """Return the version of all metrics, rescorings and relearnings in entries of a score file."""
    by_name: dict[str, int] = {}
    for key in set().union(*models):
        metric = metric_of(key)
        by_name[metric.name] = metric.version
        for change in (*RESCORINGS, *RELEARNINGS):
            if key.startswith(f"{change.name}."):
                by_name[change.name] = change.version
    return dict(sorted(by_name.items()))


def terminal_titles() -> dict[str, str]:
    """Return the keys that the terminal shows, with their titles, set by set."""
    titles: dict[str, str] = {}
    for group, words in TERMINAL_GROUPS.items():
        for metric in METRICS:
            if group in metric.terminal:
                titles[metric.key(group)] = metric.title(words)
    return titles


def searched(part: str) -> list[str]:
    """Return the keys that are this part of the search's distance."""
    return [metric.key("forget") for metric in METRICS if metric.search == part]
