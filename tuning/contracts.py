"""What the parts of a search hand each other."""

from typing import Any, NamedTuple

from pipelines.config.schema import UnlearnConfig

RUNGS = (
    4  # how often a trial of gradient steps is scored on a workbench: where a scheduler can stop it
)


class Shared(NamedTuple):
    """What all trials share, as references into Ray's object store.

    `cfg` is the configuration that trials change; `widest` the one whose adapter covers every trial's. `kept`, `forget`
    and `holdout` are tokenised rows in batches; `scored` are rows as the scorer takes them, texts included.
    """

    cfg: UnlearnConfig
    widest: UnlearnConfig
    kept: Any
    forget: Any
    holdout: Any
    scored: list[Any]
    token_kinds: tuple[str, ...]
    collected: Any = None


class Measured(NamedTuple):
    """Scores of a trial as it stands, the seconds of work on its adapter so far, and the strengths that were tried."""

    scores: dict[str, float | None]
    cost_s: float
    strengths: list[dict[str, float]]
