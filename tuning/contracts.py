"""The values that the parts of a search exchange."""

from typing import Any, NamedTuple

from pipelines.config.schema import UnlearnConfig
from rfa.settings import TokenKind

# Number of times that a gradient trial on a workbench is scored. A scheduler can stop it there.
RUNGS = 4


class Shared(NamedTuple):
    """The data that all trials share. Tables and statistics are references into Ray's object store.

    `cfg` is the configuration that trials change. `covering` has an adapter on every module that
    any trial adapts. `token_kinds` are the values of `objective.tokens` that trials use, with that
    of `covering` first. `kept_rows` (retain and utility), `forget_rows` and `holdout_rows` are
    tokenised rows in batches. `scored_rows` are the scorer's rows with their texts. `statistics` is
    a `Statistics`, and None until it has been collected.
    """

    cfg: UnlearnConfig
    covering: UnlearnConfig
    token_kinds: tuple[TokenKind, ...]
    kept_rows: list[Any]
    forget_rows: list[Any]
    holdout_rows: list[Any]
    scored_rows: list[Any]
    statistics: Any = None


class Measured(NamedTuple):
    """A trial's scores so far, the seconds its adapter took, and the strengths that were tried."""

    scores: dict[str, float | None]
    cost_s: float
    strengths: list[dict[str, float]]
