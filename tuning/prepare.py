"""What a search does once for all trials: tokenise, collect the solver's statistics, score what they are compared with.

The driver imports none of what models take: that is in `tuning.workbench`, on the workers.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from pipelines.cluster.tasks import result_of
from pipelines.config.load import with_values
from pipelines.config.schema import UnlearnConfig
from pipelines.data.sets import Sets
from pipelines.encoding.batches import plan_stream
from pipelines.encoding.labelled import build_encoder
from pipelines.evaluation.pool import evaluate, evaluation_work, pieces_of
from pipelines.preflight import oracle_of
from pipelines.terminal import Terminal
from tuning.contracts import Shared
from tuning.space import Space


def _collect(shared: Shared, rank: int, world_size: int) -> Any:
    from tuning.workbench import Workbench

    return Workbench(shared).collect(rank, world_size)


def _merge(*parts: Any) -> tuple[Any, bool]:
    """All workers' statistics, and a word that they are there."""
    for part in parts[1:]:
        parts[0].merge(part)
    return parts[0], True


def save_adapter(shared: Shared, cfg: UnlearnConfig, folder: Path) -> None:
    """Find the adapter of one configuration again, in a task, and write it in PEFT's format."""

    def save() -> None:
        from tuning.workbench import Workbench

        Workbench(shared).save_adapter(cfg, folder)

    resources = {"num_cpus": cfg.train.cpus_per_worker, "num_gpus": cfg.train.gpus_per_worker}
    result_of(ray.remote(save).options(**resources).remote())


def share_work(cfg: UnlearnConfig, space: Space, sets: Sets, terminal: Terminal) -> Shared:
    """Tokenise, and collect the solver's statistics on all workers."""
    cfg = quick(cfg)
    encoder = build_encoder(cfg)

    def rows_of(dataset: Any, batch_size: int) -> Any:
        return plan_stream(dataset, encoder, batch_size, cfg.seed).rows.to_arrow_refs()[0]

    train = cfg.train
    kept = sets.union(("retain", "utility"), present_only=True)
    widest, token_kinds = _widest(cfg, space)
    shared = Shared(
        cfg=cfg,
        widest=widest,
        kept=rows_of(kept, train.retain_batch_size),
        forget=rows_of(sets.forget, train.forget_batch_size),
        holdout=None if sets.holdout is None else rows_of(sets.holdout, train.forget_batch_size),
        scored=[piece.rows for piece in pieces_of(cfg, scored_sets(sets))],
        token_kinds=token_kinds,
    )
    bar = terminal.bar("Collecting statistics", train.max_workers + 1)
    resources = {"num_cpus": train.cpus_per_worker, "num_gpus": train.gpus_per_worker}
    task = ray.remote(_collect).options(**resources)
    parts: list[Any] = [
        task.remote(shared, rank, train.max_workers) for rank in range(train.max_workers)
    ]
    add: Any = ray.remote(num_cpus=0, num_returns=2)(_merge)
    whole, done = add.remote(*parts)
    waiting = [*parts, done]
    while waiting:
        _, waiting = ray.wait(waiting, fetch_local=False)
        bar.advance()
    result_of(done)
    return shared._replace(collected=whole)


def _widest(cfg: UnlearnConfig, space: Space) -> tuple[UnlearnConfig, tuple[str, ...]]:
    """A configuration whose adapter has all modules that any trial adapts, and the kinds of tokens that are shifted."""
    targets, layers, kinds = (
        dict.fromkeys(cfg.adapter.targets),
        [cfg.adapter.layers],
        {cfg.objective.tokens: None},
    )
    for dimension, value in space.corners():
        if dimension.key == "adapter.targets":
            targets |= dict.fromkeys(value)
        elif dimension.key == "adapter.layers":
            layers.append(value)
        elif dimension.key == "objective.tokens":
            kinds[value] = None
    ranges = [own for own in layers if own is not None]
    whole = (
        None
        if len(ranges) < len(layers)
        else [min(r[0] for r in ranges), max(r[1] for r in ranges)]
    )
    values = {
        "adapter.targets": list(targets),
        "adapter.layers": whole,
        "adapter.rank": 1,
        "objective.target": "cluster_mean",
        "objective.residual": "local",
    }
    return with_values(cfg, values), tuple(kinds)


def scored_sets(sets: Sets) -> Sets:
    """The sets that trials are scored on: general knowledge, which is never trained on, rather than the utility set."""
    if sets.general is None:
        return sets
    return replace(
        sets, utility=None, counts={name: n for name, n in sets.counts.items() if name != "utility"}
    )


def quick(cfg: UnlearnConfig) -> UnlearnConfig:
    """The configuration with what trials are scored by: likelihoods alone."""
    return with_values(cfg, {"evaluation.quick": True, "evaluation.robustness": []})


def reference_scores(
    cfg: UnlearnConfig, sets: Sets, folder: Path, terminal: Terminal
) -> dict[str, Any]:
    """Scores of the original model and of the oracle; a search that goes on has them already."""
    path = folder / "references.json"
    if not path.exists():
        cfg, sets, models = (
            quick(cfg),
            scored_sets(sets),
            {"before": cfg.model, **oracle_of(cfg, "oracle")},
        )
        bar = terminal.bar("Evaluating " + ", ".join(models), evaluation_work(cfg, models, sets))
        path.write_text(
            json.dumps(evaluate(cfg, models, sets, bar.advance), indent=2), encoding="utf-8"
        )
    return json.loads(path.read_text(encoding="utf-8"))
