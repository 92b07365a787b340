"""The work that a search does once for all trials.

It tokenises the sets, collects the solver's statistics and scores the reference models. The driver
must not import transformers or peft. So `tuning.workbench` is imported inside of tasks, which run
on the workers.
"""

import json
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import ray

from pipelines.cluster.tasks import result_of
from pipelines.config.data import HELD_SETS
from pipelines.config.load import with_values
from pipelines.config.schema import UnlearnConfig
from pipelines.data.sets import Sets
from pipelines.encoding.batches import plan_stream
from pipelines.encoding.encoder import build_encoder
from pipelines.evaluation.pool import evaluate, evaluation_work, pieces_of
from pipelines.preflight import oracles_of
from pipelines.terminal import Terminal
from rfa.settings import TokenKind
from tuning.contracts import Shared
from tuning.score import References
from tuning.space import Space


def share_work(cfg: UnlearnConfig, space: Space, sets: Sets, terminal: Terminal) -> Shared:
    """Tokenise the sets, and collect the solver's statistics on all workers."""
    cfg = likelihoods_only(cfg)
    encoder = build_encoder(cfg)
    forget_batch_size = cfg.train.forget_batch_size

    def rows_of(dataset: Any, batch_size: int) -> list[Any]:
        return plan_stream(dataset, encoder, batch_size, cfg.seed).rows.to_arrow_refs()

    kept = sets.union(HELD_SETS, present_only=True)
    holdout: list[Any] = []
    if sets.holdout is not None:
        holdout = rows_of(sets.holdout, forget_batch_size)
    kinds: list[TokenKind] = [cfg.objective.tokens, *space.values("objective.tokens")]
    scored = pieces_of(cfg, scored_sets(sets))
    shared = Shared(
        cfg=cfg,
        covering=covering_config(cfg, space),
        token_kinds=tuple(dict.fromkeys(kinds)),
        kept_rows=rows_of(kept, cfg.train.retain_batch_size),
        forget_rows=rows_of(sets.forget, forget_batch_size),
        holdout_rows=holdout,
        scored_rows=[piece.rows for piece in chain(*scored.values())],
    )
    return shared._replace(statistics=_collect_on_workers(shared, terminal))


def _collect_on_workers(shared: Shared, terminal: Terminal) -> Any:
    """Return a reference to all workers' statistics, merged."""
    train = shared.cfg.train

    def collect(shared: Shared, rank: int, world_size: int) -> Any:
        from tuning.workbench import Workbench

        return Workbench(shared).collect(rank, world_size)

    def merge(total: Any, *others: Any) -> tuple[Any, bool]:
        for other in others:
            total.merge(other)
        return total, True

    # A step for each worker's part, and one for their sum.
    bar = terminal.bar("Collecting statistics", train.max_workers + 1)
    task = ray.remote(collect).options(**_worker_resources(shared.cfg))
    world_size = train.max_workers
    parts: list[Any] = [task.remote(shared, rank, world_size) for rank in range(world_size)]
    # Of the two results the driver awaits only the flag, so that the statistics, which are large,
    # are not copied to its own node.
    merged, is_done = ray.remote(num_cpus=0, num_returns=2)(merge).remote(*parts)  # pyright: ignore
    waiting = [*parts, is_done]
    while waiting:
        _, waiting = ray.wait(waiting, fetch_local=False)
        bar.advance()
    result_of(is_done)
    return merged


def save_adapter(shared: Shared, cfg: UnlearnConfig, folder: Path) -> None:
    """Compute the adapter of one configuration again, in a task, and write it in PEFT's format."""

    def save(shared: Shared) -> None:
        from tuning.workbench import Workbench

        Workbench(shared).save_adapter(cfg, folder)

    result_of(ray.remote(save).options(**_worker_resources(cfg)).remote(shared))


def _worker_resources(cfg: UnlearnConfig) -> dict[str, float]:
    """Return the options of a Ray task that does a training worker's work."""
    return {"num_cpus": cfg.train.cpus_per_worker, "num_gpus": cfg.train.gpus_per_worker}


def covering_config(cfg: UnlearnConfig, space: Space) -> UnlearnConfig:
    """Return a configuration whose adapter has all modules that any trial adapts."""
    targets = list(cfg.adapter.targets)
    for choice in space.values("adapter.targets"):
        targets += choice
    ranges = [cfg.adapter.layers, *space.values("adapter.layers")]
    layers = None
    # None stands for all layers.
    if None not in ranges:
        layers = [min(first for first, _ in ranges), max(last for _, last in ranges)]
    values = {
        "adapter.targets": list(dict.fromkeys(targets)),
        "adapter.layers": layers,
        # The least memory: statistics are of a module's inputs, whatever its adapter's rank.
        "adapter.rank": 1,
        # The statistics that clusters need serve all other targets as well.
        "objective.target": "cluster_mean",
        "objective.residual": "local",
    }
    return with_values(cfg, values)


def scored_sets(sets: Sets) -> Sets:
    """Return the sets that trials are scored on.

    General knowledge, if there is such a set, takes the place of the utility set, because trials
    are trained on the utility set and never on general knowledge.
    """
    if sets.general is None:
        return sets
    counts = dict(sets.counts)
    counts.pop("utility", None)
    return replace(sets, utility=None, counts=counts)


def likelihoods_only(cfg: UnlearnConfig) -> UnlearnConfig:
    """Return the configuration with the evaluation of a trial: no generation and no attacks."""
    return with_values(cfg, {"evaluation.quick": True, "evaluation.robustness": []})


def reference_scores(
    cfg: UnlearnConfig, sets: Sets, folder: Path, terminal: Terminal
) -> References:
    """Score the original model and the oracles, or read the scores that an earlier search wrote."""
    path = folder / "references.json"
    if not path.exists():
        cfg = likelihoods_only(cfg)
        sets = scored_sets(sets)
        models = {"before": cfg.model, **oracles_of(cfg)}
        bar = terminal.bar("Evaluating " + ", ".join(models), evaluation_work(cfg, models, sets))
        scores = evaluate(cfg, models, sets, bar.advance).models
        path.write_text(json.dumps(scores, indent=2), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))
