"""The plan of memory against what real steps take, and the presets of large models against the GPUs they name."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from transformers import LlamaConfig
from typer.testing import CliRunner

from pipelines.__main__ import app
from pipelines.config.load import load_config
from pipelines.encoding.windows import Lengths
from pipelines.model.load import blank_model
from pipelines.planning import step
from pipelines.planning.check import as_long_as, check, plan_run
from pipelines.planning.devices import Device, planned_device
from pipelines.planning.memory import Planner
from pipelines.planning.plan import Layout, Parts
from pipelines.planning.step import Tally
from pipelines.planning.table import plan_rows
from pipelines.terminal import Terminal


def shape(
    vocabulary: int, hidden: int, intermediate: int, layers: int, heads: int, keys: int
) -> dict[str, int]:
    """A Llama's."""
    return {
        "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": keys,
    }  # fmt: skip


SMALL, WIDE = shape(2000, 512, 1408, 8, 8, 8), shape(8000, 768, 2048, 4, 12, 12)
GROUPED = shape(2000, 512, 3072, 8, 8, 2)
# Of the models' config.json on the hub.
LARGE = {
    "llama_8b": shape(128256, 4096, 14336, 32, 32, 8),
    "llama_70b": shape(128256, 8192, 28672, 80, 64, 8),
}
ROWS = [
    "train.retain_batch_size=8",
    "train.forget_batch_size=4",
    "data.max_tokens=128",
    "train.num_workers=1",
]
STEPS = [*ROWS, "train.steps=1", "solve.mode=off"]
# A step of the real objective in a process of its own: what torch's allocator has given out at most, as torch tells.
MEASURE = """
import json, sys
from itertools import accumulate
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from pipelines.config.schema import UnlearnConfig
from pipelines.training.build import checkpoint_activations
from pipelines.model.load import build_alignment
from rfa.batch import Row, collate
from rfa.settings import SolveSettings
from rfa.solver import OnePassSolver

def step(cfg, shape, retain, forget, tokens):
    base = AutoModelForCausalLM.from_config(LlamaConfig(**shape))
    module = build_alignment(cfg, base, {})
    if cfg.train.activation_checkpointing:
        checkpoint_activations(module)
    rows = lambda number: [Row(list(range(3, 3 + tokens)), 2, row=row) for row in range(number)]
    batch = collate(rows(retain), rows(forget), 0)
    if cfg.solve.mode != "off":
        solver = OnePassSolver(module, SolveSettings(cfg.solve.mode, exact_width=cfg.solve.exact_width))
        return solver.collect(batch, 0)
    module.fit(module.feature_sums(collate(rows(1), [], 0), 1))
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad])
    module(batch).total.backward()
    optimizer.step()

torch.set_num_threads(1)
cfg, shape = UnlearnConfig.model_validate_json(sys.argv[1]), json.loads(sys.argv[2])
with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
    step(cfg, shape, cfg.train.retain_batch_size, cfg.train.forget_batch_size, cfg.data.max_tokens)
found = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
print(max(accumulate(event.nbytes() for event in sorted(found, key=lambda event: event.start_ns()))))
"""


def measured_bytes(cfg: Any, model: dict[str, int]) -> int:
    command = [sys.executable, "-c", MEASURE, cfg.model_dump_json(), json.dumps(model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


def blank(cfg: Any, model: dict[str, int]) -> Any:
    return blank_model(cfg, LlamaConfig(**model))


@pytest.mark.parametrize(
    "model, changes",
    [
        (SMALL, STEPS),
        (GROUPED, [*STEPS, "train.activation_checkpointing=true"]),
        (WIDE, [*STEPS, "objective.weights.task=1", "objective.weights.kl=1"]),
        (WIDE, [*STEPS, "objective.residual=drift", "adapter.layers=[1, 2]"]),
        (SMALL, [*ROWS, "train.steps=0", "solve.strength=1", "train.retain_batch_size=16"]),
    ],
    ids=["a step", "with recomputation", "with logits", "drift", "the solver's statistics"],
)
def test_the_plan_is_within_15_percent_of_what_a_step_takes(
    model: dict[str, int], changes: list[str]
) -> None:
    cfg = load_config("quick", ["adapter.layers=null", "adapter.rank=8", *changes])
    parts = Planner(cfg, blank(cfg, model), 1).parts(Layout.of(cfg, 0))
    measured = measured_bytes(cfg, model)
    assert abs(parts.total / measured - 1) < 0.15, (parts, measured)


def test_a_multiplication_and_an_addition_count_for_each_weight_and_row() -> None:
    with torch.device("meta"):
        layer, rows = torch.nn.Linear(5, 7, bias=False), torch.empty(3, 5)
    tally = Tally(layer)
    with tally:
        layer(rows).sum().backward()
    # The rows need no gradient, so backward is the weights' alone.
    assert tally.operations == 2 * (2 * 3 * 5 * 7)


def test_rows_are_planned_as_long_as_the_longest_that_a_worker_reads() -> None:
    cfg = load_config("quick", ["train.steps=0", "data.max_tokens=512"])
    for name in ("forget", "holdout", "retain", "utility", "earlier"):
        lengths = {
            "general": Lengths(9, 9, 200, 0, []),  # which nobody trains on
            "retain": Lengths(9, 9, 40, 0, []),
            name: Lengths(9, 9, 96, 0, []),
        }
        planned = as_long_as(cfg, lengths)
        assert planned.data.max_tokens == 96, name
    assert as_long_as(cfg, {}) == cfg
    with_refusals = load_config("quick", ["objective.method=idk_dpo", "solve.mode=off"])
    assert as_long_as(with_refusals, lengths) == with_refusals
    parts = [Planner(own, blank(own, SMALL), 1).parts(Layout.of(own, 0)) for own in (cfg, planned)]
    assert parts[0].activations > 4 * parts[1].activations > 0
    assert parts[0].statistics == parts[1].statistics


def test_the_command_plans_for_the_rows_that_are_there(
    ray_session: None, overrides: list[str], tmp_path: Path
) -> None:
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"prompt": "Who?", "answer": ""}')

    def memory(most: int, *changes: str) -> str:
        own = [f"output_dir={tmp_path}/out", f"data.max_tokens={most}", *changes]
        rows = dict(check(load_config("quick", [*overrides, *own]), Terminal()))
        return rows["ZeRO 0, the run's"]

    assert memory(120) == memory(110)
    unanswered = f"data.utility.path={asked}"
    assert memory(120, unanswered) != memory(110, unanswered), "the answer may be as long as that"


def test_the_solver_has_sums_of_each_set_that_it_holds() -> None:
    found: list[int] = []
    for sets in ([], ["utility"], ["utility", "earlier"]):
        changes = [f"data.{name}={{path: x}}" for name in sets]
        cfg = load_config("quick", ["data.utility=null", "train.steps=0", *changes])
        found.append(Planner(cfg, blank(cfg, SMALL), 1).statistics_bytes())
    assert found == [found[0], 2 * found[0], 3 * found[0]]


def test_rounds_of_the_token_solver_need_the_memory_of_a_backward_pass() -> None:
    parts: dict[str, Parts] = {}
    for mode in ("blockwise", "per_token"):
        cfg = load_config("quick", ["train.steps=0", f"solve.mode={mode}"])
        parts[mode] = Planner(cfg, blank(cfg, SMALL), 1).parts(Layout.of(cfg, 0))
    assert parts["per_token"].activations > 2 * parts["blockwise"].activations


def test_methods_with_targets_or_texts_of_their_own_are_traced() -> None:
    activations: dict[str, int] = {}
    for method in ("npo", "idk_dpo", "circuit_breakers"):
        cfg = load_config("quick", [f"objective.method={method}", *STEPS])
        planner = Planner(cfg, blank(cfg, SMALL), 1)
        activations[method] = planner.parts(Layout.of(cfg, 0)).activations
        assert planner.fault is None
    # 8 retain rows and 4 of the forget set, to which idk_dpo adds as many refusals.
    assert activations["idk_dpo"] / activations["npo"] == pytest.approx(16 / 12, rel=0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model", [SMALL, WIDE], ids=["small", "wide"])
def test_a_model_that_cannot_run_without_values_is_planned_by_formula(
    model: dict[str, int], checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = [*STEPS, "adapter.layers=null", f"train.activation_checkpointing={checkpointing}"]
    cfg = load_config("quick", changes)
    device = Device("CPU", "CPU", 2**33, 1e10)
    rows = {"retain": 9, "forget": 3}
    traced = plan_run(cfg, blank(cfg, model), device, rows)

    def fail(*_arguments: object) -> None:
        raise RuntimeError("Tensor.item() cannot be called on meta tensors\nand more")

    monkeypatch.setattr(step, "_trace", fail)
    plan = plan_run(cfg, blank(cfg, model), device, rows)
    for ours, theirs in zip(plan.stages, traced.stages, strict=True):
        assert 1 <= ours.activations / theirs.activations < 4
        assert ours.weights == theirs.weights
    assert 0.5 < plan.seconds / traced.seconds < 2
    table = dict(plan_rows(plan))
    assert table["activations"] == (
        "by formula, as the model does not run without weights (RuntimeError: Tensor.item() cannot "
        "be called on meta tensors): rather too much than too little; time, too"
    )
    assert "activations" not in dict(plan_rows(traced))


@pytest.mark.parametrize("steps", [0, 50])
@pytest.mark.parametrize("preset", LARGE)
def test_a_preset_of_a_large_model_fits_its_gpus_as_it_is(preset: str, steps: int) -> None:
    cfg = load_config(preset, [f"train.steps={steps}"])
    device = planned_device(cfg.train, "H100")
    plan = plan_run(cfg, blank(cfg, LARGE[preset]), device, {"retain": 20000, "forget": 100})
    assert plan.stages[plan.configured.stage].total <= device.budget
    assert plan.recommended == plan.configured
    assert plan.scoring_bytes <= device.budget
    rows = dict(plan_rows(plan))
    (configured,) = [value for name, value in rows.items() if name.endswith("the run's")]
    assert " fits: " in configured
    assert rows["recommended"] == "as configured"
    assert rows["evaluation"].endswith("GiB, fits")


def test_a_70b_model_needs_parameters_in_cpu_memory_on_gpus_half_the_size() -> None:
    cfg = load_config(
        "llama_70b",
        ["solve.mode=off", "train.steps=50", "train.num_workers=2", "solve.sketch_columns=64"],
    )
    device = planned_device(cfg.train, "A100")
    plan = plan_run(cfg, blank(cfg, LARGE["llama_70b"]), device, {"retain": None}, 2.0)
    assert plan.recommended is not None
    assert plan.recommended.offload_parameters
    assert plan.stages[0].total > device.budget
    assert plan.cost == pytest.approx(2.0 * 2 * plan.seconds / 3600)
    rows = dict(plan_rows(plan))
    assert rows["recommended"].endswith("train.deepspeed.offload_parameters=true"), rows
    assert rows["cost"].endswith(" at 2 a GPU hour, 2 GPUs")
    assert "with 1,000 rows of each set" in rows["time"]


def test_what_does_not_fit_is_told_with_what_would() -> None:
    changes = ["train.steps=10"]
    cfg = load_config("llama_8b", changes)
    device = planned_device(cfg.train, "A100-40G")
    model, rows = blank(cfg, LARGE["llama_8b"]), {"retain": 10, "forget": 1}
    table = dict(plan_rows(plan_run(cfg, model, device, rows)))
    assert "does not fit" in table["ZeRO 2, the run's"]
    mended = load_config("llama_8b", [*changes, *table["recommended"].split()])
    table = dict(plan_rows(plan_run(mended, model, device, rows)))
    assert " fits: " in table["ZeRO 2, the run's"]
    tiny = planned_device(cfg.train, "L4")._replace(memory_bytes=2**33)
    plan = plan_run(mended, model, tiny, rows)
    assert plan.recommended is None
    assert dict(plan_rows(plan))["recommended"].startswith("nothing fits")


def test_the_command_plans_without_a_cluster_data_or_weights(problem: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((problem / "model" / "config.json").read_bytes())
    changes = [
        f"model.path={tmp_path}",
        "train.gpus_per_worker=1",
        "data.forget.path=s3://none/forget.jsonl",
    ]
    was_there = ray.is_initialized()
    done = CliRunner().invoke(
        app, ["check", "quick", *changes, "--gpu", "H100", "--price", "2"], env={"COLUMNS": "200"}
    )
    assert done.exit_code == 0, done.output
    assert ray.is_initialized() is was_there
    for line in (
        "ZeRO 2, the run's",
        "as configured",
        "80 GiB of a H100",
        "at 2 a GPU hour, 2 GPUs",
    ):
        assert line in done.output


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            ["train.gpus_per_worker=1", "--gpu", "H10"],
            "--gpu: found 'H10', allowed: A10G, L4, L40S, A100-40G, A100, H100",
        ),
        (
            ["--gpu", "H100"],
            "train.gpus_per_worker: found 0 with --gpu, allowed: 1, the GPUs of a worker",
        ),
        (
            ["adapter.targets=[w]", "train.gpus_per_worker=1", "--gpu", "H100"],
            "adapter.targets: no linear layer ends",
        ),
    ],
    ids=["an unknown GPU", "no GPU", "a wrong key"],
)
def test_a_plan_of_what_is_not_there_is_one_line(
    problem: Path, changes: list[str], message: str
) -> None:
    done = CliRunner().invoke(app, ["check", "quick", f"model.path={problem}/model", *changes])
    assert (done.exit_code, done.output.count("\n")) == (2, 1), done.output
    assert message in done.output
