"""Every family of models through the commands: what `ray-unlearn check` and `ray-unlearn run` say to a tiny one.

    python -m tests.benchmarks.families

Builds a tiny random model of each family (tests/tiny_families.py) and rows for it in a temporary folder, asks which
kinds of layers pass the check, and runs both commands with an adapter on all of those, over a Ray of its own with two
CPUs. Took 24 minutes on two busy cores. Writes docs/models.md.
"""

import logging
import os
import sys
import time
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import ray
from typer.testing import CliRunner

from pipelines.__main__ import app
from pipelines.cluster.resources import worker_environment
from pipelines.config.load import load_config
from pipelines.config.schema import ConfigError, TrainConfig
from pipelines.data.synthetic import write_problem
from pipelines.model.load import check_model
from tests.tiny_families import FAMILIES, endings, write_family
from tests.tiny_model import write_tiny_model

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
# The shortest run that has every step of one.
SETTINGS = [
    "adapter.layers=null",
    "solve.strength=0.01",
    "train.steps=1",
    "train.num_workers=1",
    "train.retain_batch_size=4",
    "evaluation.max_rows=2",
    "evaluation.max_new_tokens=2",
]
PAGE = """# Models

Measured with tiny random models of each family: `python -m tests.benchmarks.families` builds them, runs
`ray-unlearn check` and `ray-unlearn run` over Ray with an adapter on every kind of layer that can have one, and writes
this page. A run solves, takes a step, merges, compares the merged model's logits with the adapter's, and scores.
transformers {transformers}, peft {peft}, CPU, fp32. `tests/pipelines/test_families.py` holds the same without Ray,
and that the token solver brings what each of them knows down to what it thinks of never-seen rows.

| family | check | run | `adapter.targets` | refused, in a line |
|---|---|---|---|---|
{rows}

A family that is not listed is likely to work. `ray-unlearn check` runs a model without its weights, and refuses a layer
by its name where the solver could not read it. What cannot be adapted:

- **Fused experts** (Mixtral, Qwen3-MoE, gpt-oss, DeepSeek-V3 and most others). The weights of all experts are one
  tensor, and no layer is called with what one of them sees. Attention can be adapted, and so can shared experts that
  are layers, as Qwen2-MoE's. PEFT's `target_parameters` would put an adapter on experts, but the solver would have no
  features to solve it from. Groups of `prune.targets` are refused beside fused experts, since they would leave most
  weights as they are: name layers instead. The attack by rounding rounds fused experts, too.
- **Experts that each see the tokens routed to them**, also where they are layers.
- **Layers that see the sequence before the rows, or heads instead of positions**, as DeepSeek's `kv_b_proj`.
- **Weights that are read beside their layer**, as Mamba's `out_proj` and `dt_proj`, and Falcon-H1's `out_proj`: an
  adapter would compute nothing.
- In DeepSeek-V3, **layers that share a name with the experts**: PEFT takes them for those.

Layers that see rows and tokens flattened, as OPT's `fc1` and `fc2`, are read. Where a model cannot run without its
weights, `check` plans memory and time by a formula, and says so.
"""


class Told(NamedTuple):
    """A command's exit code, how long it took, and its last line."""

    code: int
    seconds: float
    line: str


def told(command: str, changes: list[str]) -> Told:
    """Run a command on this process's Ray."""
    started = time.monotonic()
    result = CliRunner().invoke(app, [command, "quick", *changes], env={"COLUMNS": "200"})
    lines = result.output.strip().splitlines() or [""]
    return Told(result.exit_code, time.monotonic() - started, lines[-1])


def row(name: str, folder: Path, data: list[str]) -> str:
    """Measure a family and return its row of the table."""
    model = write_family(name, folder / name, folder / "tokenizer")
    changes = [*data, *SETTINGS, f"model.path={model}"]
    adapted: list[str] = []
    refused: dict[str, list[str]] = {}
    for target in endings(name):
        try:
            check_model(load_config("quick", [*changes, f"adapter.targets=[{target}]"]))
            adapted.append(target)
        except ConfigError as error:
            reason = str(error).removeprefix("adapter.targets: ").replace(f"'{target}'", "it")
            refused.setdefault(reason.partition("; ")[0], []).append(target)
    changes += [f"adapter.targets={adapted}", f"output_dir={folder}/out/{name}"]
    results = [told("check", changes), told("run", changes)]
    print(f"{name}: {results}", file=sys.stderr, flush=True)
    cells = ["works" if result.code == 0 else f"fails: {result.line}" for result in results]
    notes = [f"{_code(targets)}: {reason}" for reason, targets in refused.items()]
    return f"| {name} | {' | '.join(cells)} | {_code(adapted)} | {'; '.join(notes)} |"


def _code(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def main() -> None:
    """Measure all families, or those that are named, and write the page of all."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["HF_HUB_OFFLINE"] = "1"
    ray.init(
        "local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
        runtime_env={"env_vars": worker_environment(TrainConfig())},
    )  # fmt: skip
    names = sys.argv[1:] or list(FAMILIES)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_tiny_model(folder / "tokenizer")
        write_problem(folder / "data", authors=6, questions=3, seed=0, forget=2)
        sets = ("forget", "retain", "utility", "holdout", "general")
        data = [f"data.{name}.path={folder}/data/{name}.jsonl" for name in sets]
        rows = [row(name, folder, data) for name in names]
    if names == list(FAMILIES):
        versions = {name: metadata.version(name) for name in ("transformers", "peft")}
        DOCS.write_text(PAGE.format(rows="\n".join(rows), **versions), encoding="utf-8")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
