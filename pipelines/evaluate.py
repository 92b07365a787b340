"""Scores of models on all sets, on Ray workers.

One pool of workers scores all models in turn, so that a process starts once and holds one model at a time. Rows leave
the workers as numbers; no text comes back.
"""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import ray
from ray.util import ActorPool

from pipelines.config import ModelConfig, UnlearnConfig
from pipelines.data import Sets
from pipelines.metrics import Sample, summarise
from pipelines.trainer import worker_environment

ROWS_A_PIECE = 16


def evaluate(
    cfg: UnlearnConfig, models: dict[str, ModelConfig], sets: Sets, advance: Callable[[int], None]
) -> dict[str, dict[str, float | None]]:
    """Scores of each model, `set.metric` to number or None; `advance` is told of rows as they are done.

    With a model named `oracle`, the metrics that compare with it are there for the others.
    """
    resources = {"num_cpus": cfg.train.cpus_per_worker, "num_gpus": cfg.train.gpus_per_worker}
    environment = {"env_vars": worker_environment(cfg.train)}
    remote = ray.remote(_Worker).options(**resources, runtime_env=environment)
    pieces = _pieces(cfg, sets)
    pool = ActorPool([remote.remote(cfg, models) for _ in range(cfg.train.num_workers)])
    samples: dict[str, list[tuple[str, int, Sample]]] = {name: [] for name in models}
    # Model after model, so that a worker loads each once.
    todo = [(name, piece) for name in models for piece in pieces]
    for (name, _), found in zip(todo, pool.map(_score_piece, todo), strict=True):
        samples[name] += [(set_name, row, _sample(fields)) for set_name, row, fields in found]
        advance(len(found))
    ordered = {name: [found[2] for found in sorted(own, key=lambda item: item[:2])] for name, own in samples.items()}
    return {name: summarise(own, None if name == "oracle" else ordered.get("oracle")) for name, own in ordered.items()}


class _Worker:
    """The actor around a scorer; what a scorer imports is imported here, not on the driver."""

    def __init__(self, cfg: UnlearnConfig, models: dict[str, ModelConfig]) -> None:
        from pipelines.scorer import Scorer

        self._scorer = Scorer(cfg, models)

    def score(self, name: str, rows: pa.Table) -> list[tuple[str, int, dict[str, Any]]]:
        return self._scorer.score(name, rows)


def _score_piece(actor: Any, task: tuple[str, Any]) -> Any:
    return actor.score.remote(*task)


def _sample(fields: dict[str, Any]) -> Sample:
    fields["perturbed_losses"] = tuple(fields.get("perturbed_losses", ()))
    return Sample(**fields)


def evaluated_rows(cfg: UnlearnConfig, sets: Sets) -> int:
    """Rows that each model is scored on."""
    limit = cfg.evaluation.max_rows
    return sum(count if limit is None else min(count, limit) for count in sets.counts.values())


def _pieces(cfg: UnlearnConfig, sets: Sets) -> list[Any]:
    """References to small tables of rows: all sets, thinned evenly to `evaluation.max_rows` a set."""
    cut = ray.remote(_cut)
    limit = cfg.evaluation.max_rows
    found = [
        cut.remote(block, sets.counts[name], min(limit or sets.counts[name], sets.counts[name]))
        for name, rows in sets.items()
        for block in rows.to_arrow_refs()
    ]
    return [piece for pieces in ray.get(found) for piece in pieces]


def _cut(block: pa.Table, count: int, limit: int) -> list[Any]:
    keep = [(row + 1) * limit // count > row * limit // count for row in block["row"].to_pylist()]
    rows = block.filter(pa.array(keep, pa.bool_()))
    return [ray.put(rows.slice(start, ROWS_A_PIECE)) for start in range(0, rows.num_rows, ROWS_A_PIECE)]
