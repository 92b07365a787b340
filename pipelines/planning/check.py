"""`ray-unlearn check`: the checks of a run before it trains, and a plan of what it needs."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import ray

from pipelines.cluster.resources import zero_stage
from pipelines.cluster.session import session, temporary_log
from pipelines.cluster.tasks import on_this_node, result_of
from pipelines.config.data import HELD_SETS
from pipelines.config.schema import UnlearnConfig
from pipelines.encoding.windows import Lengths
from pipelines.planning.devices import Device, planned_device, present_device
from pipelines.planning.plan import ASSUMED_UTILISATION, Layout, Plan, RowCounts
from pipelines.planning.table import Rows, plan_rows, run_rows
from pipelines.preflight import check_settings, preflight
from pipelines.storage.run_folder import RunFolder
from pipelines.terminal import Terminal

if TYPE_CHECKING:
    from peft import PeftModel


def check(
    cfg: UnlearnConfig, terminal: Terminal, *, gpu: str | None = None, price: float | None = None
) -> Rows:
    """Check all that `unlearn` checks before it trains, and describe the run and its needs.

    Nothing is generated or trained. With `gpu`, a name in `GPUS`, only plan for such a cluster:
    neither it nor the data need be there. `price` is for one GPU and hour.

    Raises:
        ConfigError: as `unlearn`, or an unknown `gpu`.
    """
    check_settings(cfg, "run")
    if gpu is not None:
        device = planned_device(cfg.train, gpu)
        # `max_rows` is all that is known of a set without reading it.
        limits: RowCounts = {}
        for name in (*HELD_SETS, "forget", "holdout"):
            source = getattr(cfg.data, name)
            if source is not None:
                limits[name] = source.max_rows
        return plan_rows(plan_configured(cfg, device, limits, price))
    run = RunFolder(cfg, "run")
    with temporary_log() as log, session(cfg.train, log, terminal):
        sets, size, lengths = preflight(cfg, "run", terminal, run=run)
        rows: RowCounts = {name: sets.counts[name] for name in sets.names()}
        rows |= {name: of_set.windows for name, of_set in lengths.items()}
        device = present_device(cfg.train)
        # A run answers what has no answer before the workers read it: how long, nobody knows yet.
        planned = cfg if sets.unanswered else as_long_as(cfg, lengths)
        # A task, because the plan needs transformers, which the driver does not import.
        plan = result_of(on_this_node(plan_configured).remote(planned, device, rows, price))
        return run_rows(run, sets, size, lengths, ray.cluster_resources()) + plan_rows(plan)


def as_long_as(cfg: UnlearnConfig, lengths: Mapping[str, Lengths]) -> UnlearnConfig:
    """Return a configuration that reads no more tokens at once than the workers' longest row has.

    Refusals, which some objectives read beside the rows, have not been measured.
    """
    if cfg.objective.settings().reads_refusals:
        return cfg
    read = ("forget", "holdout", *HELD_SETS)
    longest = max((lengths[name].longest_read for name in read if name in lengths), default=0)
    if not longest:
        return cfg
    data = cfg.data.model_copy(update={"max_tokens": longest})
    return cfg.model_copy(update={"data": data})


def plan_configured(
    cfg: UnlearnConfig, device: Device, rows: RowCounts, price: float | None
) -> Plan:
    """Plan a run of the model that is configured; its config.json suffices.

    Raises:
        ConfigError: the model or its adapter cannot be built.
    """
    from pipelines.model.folder import load_model_config
    from pipelines.model.load import blank_model

    model_config = load_model_config(cfg.model, wants_weights=False)
    return plan_run(cfg, blank_model(cfg, model_config), device, rows, price)


def plan_run(
    cfg: UnlearnConfig,
    model: "PeftModel",
    device: Device,
    rows: RowCounts,
    price: float | None = None,
) -> Plan:
    """Plan a run of a model that has its adapters and no weights.

    `rows` gives the rows of each set, None where they are unknown.
    """
    from pipelines.planning.memory import Planner

    train = cfg.train
    # Fewer workers hold more each: a layout that fits the fewest fits any number.
    planner = Planner(cfg, model, train.min_workers)
    gpu_bytes = device.memory_bytes if device.kind == "GPU" else 0
    configured = Layout.of(cfg, zero_stage(train, planner.weight_bytes, gpu_bytes))
    recommended = planner.recommend(device.budget, configured.stage)
    rate = device.operations_per_s
    if train.precision == "fp32":
        rate *= 0.5  # the data sheets give TF32 half the rate of bf16
    rate = rate or measured_rate()
    operations = planner.operations(recommended or configured, rows)
    # A scoring worker holds a model unpartitioned, and a language model beside the one before.
    scoring_bytes = planner.weight_bytes * (2 if cfg.task == "causal_lm" else 1)
    scoring_gpus = max(1.0, cfg.evaluation.gpus_per_worker or train.gpus_per_worker)
    return Plan(
        device=device,
        configured=configured,
        stages=[planner.parts(Layout.of(cfg, stage)) for stage in range(4)],
        scoring_bytes=scoring_bytes / scoring_gpus,
        recommended=recommended,
        operations_per_s=rate,
        seconds=operations / (ASSUMED_UTILISATION * rate),
        assumes_rows=not all(rows.values()),
        gpus=train.min_workers * train.gpus_per_worker,
        price=price,
        fault=planner.fault,
    )


def measured_rate() -> float:
    """Measure the operations a second of matrix products on this CPU, with a worker's threads."""
    import torch

    side = 1024
    matrix = torch.ones(side, side)
    torch.mm(matrix, matrix)  # the first product starts the threads
    started = time.monotonic()
    products = 0
    while time.monotonic() - started < 0.2:
        torch.mm(matrix, matrix)
        products += 1
    return products * 2 * side**3 / (time.monotonic() - started)
