"""Keys that only some configurations read, so that none is set in vain."""

from collections.abc import Callable
from typing import NamedTuple

from pipelines.config.schema import UnlearnConfig

# These decide which of the keys below are read. A search may try several values of them.
DECIDING = ("solve.mode", "train.steps", "prune.method")


class Readers(NamedTuple):
    """Keys of one section, whether a configuration reads them, and what does, in words."""

    section: str
    keys: tuple[str, ...]
    are_read: Callable[[UnlearnConfig], bool]
    words: str


def _trains(cfg: UnlearnConfig) -> bool:
    return cfg.train.steps > 0


def _solves_for_targets(cfg: UnlearnConfig) -> bool:
    return cfg.solve.settings().reads_targets


def _solves_from_statistics_alone(cfg: UnlearnConfig) -> bool:
    # Pruning and gradient steps read the retain set.
    reads_rows = _trains(cfg) or cfg.prune.method != "none"
    return cfg.solve.mode == "per_token" and not reads_rows


READERS = (
    Readers(
        "objective",
        ("method", "weights", "schedule", "stop_at", "distance", "output", "output_parameters"),
        _trains,
        "train.steps above 0",
    ),
    Readers(
        "objective",
        ("target", "clusters", "steering"),
        lambda cfg: _trains(cfg) or _solves_for_targets(cfg),
        "solve.mode=one_pass or blockwise, or train.steps above 0",
    ),
    Readers(
        "solve",
        ("strength", "fact_weight"),
        _solves_for_targets,
        "solve.mode=one_pass or blockwise",
    ),
    Readers(
        "solve",
        ("prepared",),
        _solves_from_statistics_alone,
        "solve.mode=per_token, prune.method=none and train.steps=0",
    ),
    Readers(
        "prune",
        ("sparsity", "targets", "keep_sparsity"),
        lambda cfg: cfg.prune.method != "none",
        "a prune.method",
    ),
)


def first_unread(cfg: UnlearnConfig) -> tuple[str, str] | None:
    """Return the first key that is not at its default and is not read, and what would read it."""
    for section, keys, are_read, words in READERS:
        given, default = getattr(cfg, section), UnlearnConfig.model_fields[section].default
        for key in keys:
            if getattr(given, key) != getattr(default, key) and not are_read(cfg):
                return f"{section}.{key}", words
    return None
