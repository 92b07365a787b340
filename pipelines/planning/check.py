"""`ray-unlearn check`: everything that a run checks before it trains, and what it would need, as a table."""

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import ray

from pipelines.cluster.resources import gpu_memory_bytes, zero_stage
from pipelines.cluster.session import session
from pipelines.cluster.tasks import on_this_node, result_of
from pipelines.config.schema import ConfigError, TrainConfig, UnlearnConfig
from pipelines.data.sets import Sets
from pipelines.preflight import check_settings, preflight
from pipelines.storage.run_folder import RunFolder, weight_bytes
from pipelines.terminal import Terminal

GIB = 2**30
# Memory in GiB, and dense bf16 operations a second of the tensor cores, from NVIDIA's data sheets; Ray's names.
GPUS = {
    "A10G": (24, 70e12),
    "L4": (24, 121e12),
    "L40S": (48, 362e12),
    "A100-40G": (40, 312e12),
    "A100": (80, 312e12),
    "H100": (80, 989e12),
    "H200": (141, 989e12),
}
REACHED = 0.3  # share of a device's operations that a run is assumed to reach; not measured
SPARE = 0.9  # of a device's memory, what may be planned with: the rest is lost between the pieces
RUNTIME_BYTES = {
    "GPU": 2 * GIB,
    "CPU": GIB,
}  # CUDA's and NCCL's own; a process with torch and Ray in it

Rows = list[tuple[str, str]]


class Device(NamedTuple):
    """What a worker computes on: its memory, and operations a second, 0 where they are not known."""

    name: str
    kind: str
    memory_bytes: int
    operations_per_s: float

    @property
    def budget(self) -> int:
        """Bytes that may be planned with."""
        return int(self.memory_bytes * SPARE) - RUNTIME_BYTES[self.kind]


def check(
    cfg: UnlearnConfig, terminal: Terminal, *, gpu: str | None = None, price: float | None = None
) -> Rows:
    """Everything `unlearn` checks before it trains, and what it would need. Nothing is generated.

    With `gpu`, one of `GPUS`, the plan alone, for such a cluster: neither it nor the data need be there. `price` is
    for a GPU and hour.

    Raises:
        ConfigError: as `unlearn`; an unknown kind of GPU.
    """
    check_settings(cfg, "run")
    if gpu is not None:
        device = planned_device(cfg.train, gpu)
        return plan_rows(cfg, device, _row_limits(cfg), price)
    run = RunFolder(cfg, "run")
    with TemporaryDirectory() as folder, session(cfg.train, Path(folder) / "run.log", terminal):
        sets, size = preflight(cfg, "run", terminal, run=run)
        have, device = ray.cluster_resources(), present_device(cfg.train)
        needs = result_of(on_this_node(plan_rows).remote(cfg, device, _row_counts(sets), price))
    weights = weight_bytes(cfg.model.path)
    least, most = cfg.train.min_workers, cfg.train.max_workers
    workers = f"{most}" if least == most else f"{least} to {most}"
    return [
        ("output_dir", f"{run.output.url}{' (to be continued)' if run.manifest() else ''}"),
        (
            "model",
            f"{cfg.model.path}, {size.parameters / 1e6:,.1f} M parameters, {weights / GIB:.2f} GiB of weights",
        ),
        ("adapter", f"{size.adapter / 1e6:,.2f} M parameters"),
        *((f"data.{name}", f"{sets.counts[name]} rows") for name in sets.names()),
        (
            "prune",
            f"{cfg.prune.method}, {cfg.prune.sparsity:.0%}"
            if cfg.prune.method != "none"
            else "none",
        ),
        ("solver", f"{cfg.solve.mode}, strength {cfg.solve.strength}"),
        (
            "steps",
            f"{cfg.train.steps} of {cfg.train.forget_batch_size} forget and {cfg.train.retain_batch_size} retain rows",
        ),
        (
            "workers",
            f"{workers} x {cfg.train.cpus_per_worker:g} CPU, {cfg.train.gpus_per_worker:g} GPU",
        ),
        (
            "cluster",
            f"{have.get('CPU', 0):g} CPU, {have.get('GPU', 0):g} GPU, {have.get('memory', 0) / GIB:.0f} GiB",
        ),
        *needs,
    ]


def planned_device(train: TrainConfig, gpu: str) -> Device:
    """A GPU that is not here yet.

    Raises:
        ConfigError: it is not known, or the configuration's workers have none.
    """
    if gpu not in GPUS:
        raise ConfigError(f"--gpu: found '{gpu}', allowed: {', '.join(GPUS)}")
    if train.gpus_per_worker == 0:
        raise ConfigError(
            "train.gpus_per_worker: found 0 with --gpu, allowed: 1, the GPUs of a worker"
        )
    memory, operations = GPUS[gpu]
    return Device(gpu, "GPU", memory * GIB, operations)


def present_device(train: TrainConfig) -> Device:
    """What a worker of the cluster that is joined computes on."""
    have = ray.cluster_resources()
    if train.gpus_per_worker == 0:
        return Device("CPU", "CPU", int(have.get("memory", 0) / train.max_workers), 0.0)
    kinds = [
        name.removeprefix("accelerator_type:")
        for name in have
        if name.startswith("accelerator_type:")
    ]
    operations = [GPUS[kind][1] for kind in kinds if kind in GPUS]
    return Device(
        ", ".join(kinds) or "GPU", "GPU", gpu_memory_bytes(train), min(operations, default=0.0)
    )


def _row_limits(cfg: UnlearnConfig) -> dict[str, int | None]:
    data = cfg.data
    named = {
        "retain": data.retain,
        "utility": data.utility,
        "forget": data.forget,
        "holdout": data.holdout,
    }
    return {name: own.max_rows for name, own in named.items() if own is not None}


def _row_counts(sets: Sets) -> dict[str, int | None]:
    return {name: sets.counts[name] for name in sets.names()}


def plan_rows(
    cfg: UnlearnConfig, device: Device, rows: dict[str, int | None], price: float | None
) -> Rows:
    """Memory of a worker in each ZeRO stage, what to set where it does not fit, time and cost."""
    from pipelines.model.load import blank_model, load_model_config

    model_config = load_model_config(cfg.model, wants_weights=False)
    return plan_of(cfg, blank_model(cfg, model_config), device, rows, price)


def plan_of(
    cfg: UnlearnConfig,
    model: Any,
    device: Device,
    rows: dict[str, int | None],
    price: float | None = None,
) -> Rows:
    """As `plan_rows`, for a model without weights that has its adapters."""
    from pipelines.planning.memory import Layout, Planner

    train = cfg.train
    planner = Planner(cfg, model, train.min_workers)  # what fits the fewest fits more
    stage = zero_stage(
        train, planner.weight_bytes, device.memory_bytes if device.kind == "GPU" else 0
    )
    table: Rows = []
    for each in (0, 1, 2, 3):
        parts = planner.parts(Layout.of(cfg, each))
        named = ", ".join(
            f"{name} {value / GIB:.2f}"
            for name, value in parts._asdict().items()
            if name != "total"
        )
        fits = "fits" if parts.total <= device.budget else "does not fit"
        own = ", the run's" if each == stage else ""
        table.append((f"ZeRO {each}{own}", f"{parts.total / GIB:.2f} GiB at most, {fits}: {named}"))
    table.append(_evaluation(cfg, planner.weight_bytes, device))
    memory = f"{device.memory_bytes / GIB:.0f} GiB of a {device.name}, {device.budget / GIB:.1f} to plan with"
    layout = planner.recommend(device.budget, stage)
    if layout is None:
        advice = "nothing fits: a shorter data.max_tokens, a lower solve.exact_width, larger devices or more of them"
    else:
        advice = " ".join(layout.changes(cfg, stage)) or "as configured"
    table += [("memory", memory), ("recommended", advice)]
    rate = device.operations_per_s * (0.5 if train.precision == "fp32" else 1) or _measured_rate()
    seconds = planner.operations(layout or Layout.of(cfg, stage), rows) / (REACHED * rate)
    each = "" if all(rows.values()) else ", with 1,000 rows of each set without max_rows"
    what = f"the solver's passes and the steps, at {REACHED:.0%} of {rate / 1e12:,.1f} T operations a second"
    left_out = "start-up, factoring on the CPU and evaluation"
    table.append(("time", f"about {_duration(seconds)}{each}: {what}; without {left_out}"))
    if price is not None:
        gpus = train.min_workers * train.gpus_per_worker
        table.append(
            (
                "cost",
                f"about {price * gpus * seconds / 3600:,.2f} at {price:g} a GPU hour, {gpus:g} GPUs",
            )
        )
    return table


def _evaluation(cfg: UnlearnConfig, weights: int, device: Device) -> tuple[str, str]:
    """What a scoring worker holds: all of a model, beside another while they are compared."""
    if cfg.task == "causal_lm":
        weights *= 2
    gpus = max(1.0, cfg.evaluation.gpus_per_worker or cfg.train.gpus_per_worker)
    fits = "fits" if weights / gpus <= device.budget else "does not fit: evaluation.gpus_per_worker"
    return "evaluation", f"weights {weights / gpus / GIB:.2f} GiB, {fits}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _measured_rate() -> float:
    """Operations a second of a matrix product on this machine's CPU; a worker's threads are this process's."""
    import torch

    side = 1024
    a = torch.ones(side, side)
    torch.mm(a, a)
    started, done = time.monotonic(), 0
    while time.monotonic() - started < 0.2:
        torch.mm(a, a)
        done += 1
    return done * 2 * side**3 / (time.monotonic() - started)
