"""What there is to know about a metric, in one record; `table` lists them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from pipelines.evaluation.metrics.formulas import OfModel, OfSet, RowsBySet, gives_answers
from pipelines.evaluation.metrics.likelihood import Answer

Unit = Literal["share", "AUC", "nats", "perplexity", "percent", "p-value", "distance", "steps"]
NEEDS_ORACLE = "compares with the retrained oracle"  # an `absent` of both tables


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric. `name` is its key in a score file, after the set if it is one of sets."""

    name: str
    label: str  # as inside a sentence
    help: str
    # What a model that remembers the forget set scores; "neither" where only the distance counts.
    remembered: Literal["higher", "lower", "neither"] = "higher"
    # The page draws shares and AUCs, which lie in [0, 1].
    unit: Unit = "share"
    version: int = 1  # rises when the metric's value can change
    absent: str = "not measured, or not a finite number"  # why a score file may hold no number

    # One of these is the formula. `of_curve` is measured on relearned models, after each of STEPS.
    of_set: OfSet | None = None
    of_model: OfModel | None = None
    of_curve: OfSet | Callable[..., int | None] | None = None
    # Gives a row's number `reads`, or several, on the worker, from one answer.
    of_answer: Callable[[Answer], float | list[float] | None] | None = None
    reads: str = ""
    # Whether a model's entry has this metric of the model at all.
    applies: Callable[[RowsBySet, RowsBySet | None], bool] = gives_answers

    # The terminal shows it for these sets, or as an attack ("mia"), or for the whole model ("").
    terminal: tuple[str, ...] = ()
    judged: bool = False  # the verdict counts it, of the forget set where it is measured on sets
    # While it is nearer to the original nothing counts as forgotten; the words that name it then.
    decisive: str = ""
    # Where it should stay as before: sets, or "" for the whole model; the words for what was lost.
    kept: Mapping[str, str] = field(default_factory=dict[str, str])
    is_utility: bool = False  # the search's `utility`; a verdict names it always
    # The part of the search's `distance` that it is.
    search: Literal["own words", "other words", "classes"] | None = None
    is_verbatim: bool = False  # about the words of single answers, which no other set must keep

    def key(self, set_name: str) -> str:
        """Return its key in a score file: of this set if it is one of sets, else of the model."""
        return f"{set_name}.{self.name}" if self.of_set else self.name

    def title(self, group: str = "") -> str:
        """Return the label as the beginning of a line, after the set or attack that it is of."""
        text = f"{group}: {self.label}" if group else self.label
        return text[0].upper() + text[1:]
