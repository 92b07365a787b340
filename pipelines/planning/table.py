"""The table that `check` prints: what a run would do, and its plan, in words."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pipelines.data.sets import Sets
from pipelines.encoding.windows import Lengths, treatment
from pipelines.planning.devices import GIB
from pipelines.planning.plan import ASSUMED_ROWS, ASSUMED_UTILISATION, Parts, Plan
from pipelines.storage.run_folder import RunFolder, weight_bytes

if TYPE_CHECKING:
    from pipelines.model.load import ModelSize

Rows = list[tuple[str, str]]


def run_rows(
    run: RunFolder,
    sets: Sets,
    size: "ModelSize",
    lengths: Mapping[str, Lengths],
    cluster: Mapping[str, float],
) -> Rows:
    """Describe the run: its folder, model, data, settings and the resources of its cluster."""
    cfg = run.cfg
    train = cfg.train
    output = run.output.url
    if run.manifest():
        output += " (to be continued)"
    rows = [
        ("output_dir", output),
        (
            "model",
            f"{cfg.model.path}, {size.parameters / 1e6:,.1f} M parameters, "
            f"{weight_bytes(cfg.model.path) / GIB:.2f} GiB of weights",
        ),
        ("adapter", f"{size.adapter / 1e6:,.2f} M parameters"),
    ]
    for name in sets.names():
        found = f"{sets.counts[name]} rows"
        if name in lengths:
            found += f", {lengths[name].tokens:,} tokens"
        if name in lengths and lengths[name].long_rows:
            found += f", {lengths[name].long_rows:,} too long: {treatment(name, lengths[name])}"
        rows.append((f"data.{name}", found))
    prune = cfg.prune.method
    if prune != "none":
        prune += f", {cfg.prune.sparsity:.0%}"
    solver: str = cfg.solve.mode
    if cfg.solve.settings().reads_targets:
        solver += f", strength {cfg.solve.strength}"
    workers = f"{train.max_workers}"
    if train.min_workers != train.max_workers:
        workers = f"{train.min_workers} to {train.max_workers}"
    rows += [
        ("prune", prune),
        ("solver", solver),
        (
            "steps",
            f"{train.steps} of {train.forget_batch_size} forget "
            f"and {train.retain_batch_size} retain rows",
        ),
        (
            "workers",
            f"{workers} x {train.cpus_per_worker:g} CPU, {train.gpus_per_worker:g} GPU",
        ),
        (
            "cluster",
            f"{cluster.get('CPU', 0):g} CPU, {cluster.get('GPU', 0):g} GPU, "
            f"{cluster.get('memory', 0) / GIB:.0f} GiB",
        ),
    ]
    return rows


def plan_rows(plan: Plan) -> Rows:
    """Describe a plan: memory in each ZeRO stage, settings that fit, time and cost."""
    device = plan.device
    rows: Rows = []
    for stage, parts in enumerate(plan.stages):
        name = f"ZeRO {stage}"
        if stage == plan.configured.stage:
            name += ", the run's"
        rows.append((name, _memory(parts, device.budget)))
    scoring = f"weights {plan.scoring_bytes / GIB:.2f} GiB, "
    if plan.scoring_bytes <= device.budget:
        scoring += "fits"
    else:
        scoring += "does not fit: evaluation.gpus_per_worker"
    if plan.recommended is None:
        advice = (
            "nothing fits: a shorter data.max_tokens, a lower solve.exact_width, "
            "larger devices or more of them"
        )
    else:
        advice = " ".join(plan.recommended.changes_from(plan.configured)) or "as configured"
    rows += [
        ("evaluation", scoring),
        (
            "memory",
            f"{device.memory_bytes / GIB:.0f} GiB of a {device.name}, "
            f"{device.budget / GIB:.1f} to plan with",
        ),
        ("recommended", advice),
        ("time", _time(plan)),
    ]
    if plan.fault is not None:
        told = f"by formula, as the model does not run without weights ({plan.fault})"
        rows.append(("activations", f"{told}: rather too much than too little; time, too"))
    if plan.price is not None:
        cost = f"about {plan.cost:,.2f} at {plan.price:g} a GPU hour, {plan.gpus:g} GPUs"
        rows.append(("cost", cost))
    return rows


def _memory(parts: Parts, budget: int) -> str:
    # The parts exceed the total, which is a peak: not all of them are there at once.
    purposes: list[str] = []
    for name, size in parts._asdict().items():
        if name != "total":
            purposes.append(f"{name} {size / GIB:.2f}")
    verdict = "fits" if parts.total <= budget else "does not fit"
    return f"{parts.total / GIB:.2f} GiB at most, {verdict}: {', '.join(purposes)}"


def _time(plan: Plan) -> str:
    if plan.seconds < 120:
        duration = f"{plan.seconds:.0f} s"
    elif plan.seconds < 7200:
        duration = f"{plan.seconds / 60:.0f} min"
    else:
        duration = f"{plan.seconds / 3600:.1f} h"
    assumption = ""
    if plan.assumes_rows:
        assumption = f", with {ASSUMED_ROWS:,} rows of each set without max_rows"
    return (
        f"about {duration}{assumption}: the solver's passes and the steps, "
        f"at {ASSUMED_UTILISATION:.0%} of {plan.operations_per_s / 1e12:,.1f} T operations "
        "a second; without start-up, factoring on the CPU and evaluation"
    )
