"""What the parts of a search hand each other."""

from typing import Any, NamedTuple

from pipelines.config.schema import UnlearnConfig
from rfa.settings import TokenKind

# A gradient trial on a workbench is scored this often, and a scheduler can stop it there.
RUNGS = 4


class Shared(NamedTuple):
    """What all trials share. Tables and statistics are references into Ray's object store.

    `cfg` is the configuration that trials change. `covering` has an adapter on every module that any trial adapts, and
    `token_kinds` are the values of `objective.tokens` that trials use, `covering`'s first. `kept_rows` (retain and
    utility), `forget_rows` and `holdout_rows` are tokenised rows in batches; `scored_rows` are the scorer's, texts
    included. `statistics` is a `Statistics`, absent until it has been collected.
    """

    cfg: UnlearnConfig
    covering: UnlearnConfig
    token_kinds: tuple[TokenKind, ...]
    kept_rows: Any
    forget_rows: Any
    holdout_rows: Any
    scored_rows: list[Any]
    statistics: Any = None


class Measured(NamedTuple):
    """A trial's scores so far, the seconds spent on its adapter, and the strengths that were tried."""

    scores: dict[str, float | None]
    cost_s: float
    strengths: list[dict[str, float]]
