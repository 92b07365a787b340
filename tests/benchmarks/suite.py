"""Every method on every problem, judged beside two retrained oracles: docs/suite.md.

    python -m tests.benchmarks.suite [--problems authors-0,...] [--methods per-token,...]

Each piece is a command of the product in a process of its own: data, target, oracles, and one `run` a method. What is
complete is not made again, so that an interrupted suite goes on; the page shows what is there. Settings were chosen on
authors-0 alone; all other problems are tests.
"""

import argparse
import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl

from pipelines.evaluation.verdict import verdict

FOLDER = Path("outputs/suite")
DOCS = Path(__file__).parents[2] / "docs"
SMOLLM = "models/SmolLM2-135M-Instruct"
ORACLES = (0, 1)  # their seeds
SETS = ("forget", "retain", "utility", "holdout", "general")  # of `make-data`
TEACH = ("train.num_workers=1", "train.cpus_per_worker=2", "data.utility.max_rows=40")

# The models of the problems named after them; all others have SmolLM.
MODELS = {"gemma": "models/gemma-3-270m", "qwen": "models/Qwen2.5-Coder-0.5B-Instruct"}
# Options of `make-data`.
PROBLEMS = {
    "authors-0": ("--authors", "20", "--questions", "3", "--forget", "3", "--seed", "0"),
    "authors-1": ("--authors", "20", "--questions", "3", "--forget", "3", "--seed", "1"),
    "authors-2": ("--authors", "20", "--questions", "3", "--forget", "3", "--seed", "2"),
    "gemma": ("--authors", "20", "--questions", "3", "--forget", "3", "--seed", "0"),
    "qwen": ("--authors", "20", "--questions", "3", "--forget", "3", "--seed", "0"),
    "60-of-300": ("--authors", "100", "--questions", "3", "--forget", "20", "--seed", "0"),
    "6-of-300": ("--authors", "100", "--questions", "3", "--forget", "2", "--seed", "0"),
}
RANK_64 = ("adapter.rank=64", "adapter.alpha=64")
SHIFT = ("objective.target=cluster_mean", "objective.tokens=answer")
# The solver that moves all features to their targets by one strength, as older benchmarks measured it.
ONE_STRENGTH = ("solve.mode=blockwise", "adapter.rank=32", "adapter.alpha=32", *SHIFT)
METHODS = {
    "per-token": ("solve.mode=per_token", *RANK_64),
    "one-strength": ("solve.mode=blockwise", *RANK_64, *SHIFT),
    # By token distance the best rates that were tried: of 3e-4, 5e-4 and 1e-3, and of 5e-4 and 1e-3.
    "npo": ("solve.mode=off", "objective.method=npo", "train.steps=20", "train.learning_rate=3e-4"),
    "gradient-difference": (
        "solve.mode=off",
        "objective.method=gradient_difference",
        "train.steps=20",
        "train.learning_rate=5e-4",
    ),
    "rfa-by-gradient": (
        "solve.mode=off",
        "train.learning_rate=5e-4",
        "train.steps=40",
        *SHIFT,
        "adapter.rank=16",
        "adapter.layers=[8,20]",
        "objective.weights={retain: 1, forget: 0.3, task: 3, output: 0.2}",
    ),
}
MARKERS = "osD^v<>"  # a problem each
# The rows of the tables.
SCORES = (
    "forget.token_distance",
    "forget.token_distance_paraphrased",
    "forget.probability",
    "forget.probability_paraphrased",
    "forget.fact_recall",
    "forget.fact_recall_paraphrased",
    "forget.remembered_rows",
    "mia.loss",
    "mia.zlib",
    "mia.min_k",
    "mia.min_k_plus_plus",
    "mia.grad_norm",
    "retain.probability",
    "general.probability",
    "retain.kept_distance",
    "general.kept_distance",
)


class Outcome(NamedTuple):
    """What the runs of one problem left: each method's scores.json."""

    problem: str
    scores: dict[str, Mapping[str, Any]]


class Command(NamedTuple):
    """A command of the product, and where its results go."""

    arguments: tuple[str, ...]
    output: Path

    @property
    def folder(self) -> Path:
        """The folder of the results, named by the command's digest."""
        digest = hashlib.sha256("\0".join(self.arguments).encode()).hexdigest()[:8]
        return self.output.with_name(f"{self.output.name}-{digest}")

    @property
    def is_complete(self) -> bool:
        """Whether the command has been run to its end."""
        manifest = self.folder / "manifest.json"
        return manifest.exists() and json.loads(manifest.read_text())["status"] == "complete"

    def run(self) -> Path:
        """Run the command unless it is complete, and return its folder."""
        if not self.is_complete:
            print(f"{self.folder}: ray-unlearn {' '.join(self.arguments)}", flush=True)
            command = [sys.executable, "-m", "pipelines", *self.arguments]
            subprocess.run([*command, f"output_dir={self.folder}"], check=True)
        return self.folder


def ray_unlearn(*arguments: str, output: Path) -> Path:
    """Run a command of the product into a folder, unless it is complete; returns the folder."""
    return Command(arguments, output).run()


def sets_of(problem: str) -> list[str]:
    return [f"data.{name}.path={FOLDER / problem}/data/{name}.jsonl" for name in SETS]


def target_of(problem: str) -> Command:
    """Return the command that teaches a model all rows of a problem."""
    model = f"model.path={MODELS.get(problem, SMOLLM)}"
    arguments = ("finetune", "demo", *sets_of(problem), model, *TEACH)
    return Command(arguments, FOLDER / problem / "target")


def oracles_of(problem: str) -> list[Command]:
    """Return the commands that teach a model a problem's rows without the forget set."""
    oracles: list[Command] = []
    for seed in ORACLES:
        arguments = (
            *target_of(problem).arguments,
            "finetune.sets=[retain,utility]",
            f"seed={seed}",
        )
        oracles.append(Command(arguments, FOLDER / problem / "oracle"))
    return oracles


def run_of(problem: str, method: str) -> Command:
    """Return the command that unlearns by a method, and judges it beside the oracles."""
    oracles = ",".join(f"{oracle.folder}/model" for oracle in oracles_of(problem))
    changes = (
        *sets_of(problem),
        f"model.path={target_of(problem).folder}/model",
        f"evaluation.oracle=[{oracles}]",
        "evaluation.robustness=[]",
        *METHODS[method],
    )
    return Command(("run", "demo", *changes), FOLDER / problem / method)


def make(problem: str, methods: Sequence[str]) -> None:
    """Make what is missing of a problem, and run the methods on it."""
    model = Path(MODELS.get(problem, SMOLLM))
    if not model.exists():
        subprocess.run([sys.executable, "-m", "tests.fetch_model", str(model)], check=True)
    data = FOLDER / problem / "data"
    if not data.exists():
        make_data = [sys.executable, "-m", "pipelines", "make-data", str(data), *PROBLEMS[problem]]
        subprocess.run(make_data, check=True)
    for command in (target_of(problem), *oracles_of(problem)):
        command.run()
    for method in methods:
        run_of(problem, method).run()


def outcome_of(problem: str) -> Outcome:
    """Return the scores of all methods that have been run on a problem."""
    scores: dict[str, Mapping[str, Any]] = {}
    for method in METHODS:
        run = run_of(problem, method)
        if run.is_complete:
            scores[method] = json.loads((run.folder / "scores.json").read_text())
    return Outcome(problem, scores)


def table(outcome: Outcome) -> list[str]:
    """Return the lines of one problem's table; the oracles' column has half their spread."""
    methods = list(outcome.scores)
    first = outcome.scores[methods[0]]
    spread = first["oracle_spread"]
    lines = [
        "| | before | oracles | " + " | ".join(methods) + " |",
        "|---|---:|---:|" + "---:|" * len(methods),
    ]
    for name in SCORES:
        cells = [number(first["models"]["before"].get(name))]
        of_oracles = number(first["models"]["oracle"].get(name))
        if name in spread:
            of_oracles += f" ± {number(spread[name] / 2)}"
        cells.append(of_oracles)
        for method in methods:
            cells.append(number(outcome.scores[method]["models"]["after"].get(name)))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    costs = [outcome.scores[method]["cost"] for method in methods]
    memory = [f"{cost['peak_memory_bytes'] / 2**30:.2f}" for cost in costs]
    levels = [verdict(outcome.scores[method]).level for method in methods]
    lines.append("| peak memory of a worker, GiB | | | " + " | ".join(memory) + " |")
    lines.append("| verdict | | | " + " | ".join(levels) + " |")
    return lines


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def write(outcomes: Sequence[Outcome]) -> None:
    """Write docs/suite.md with its plot."""
    packages = [
        f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "peft", "ray")
    ]
    lines = [
        "# The suite",
        "",
        f"Written by `python -m tests.benchmarks.suite` on {platform.machine()}, two CPU workers of one thread, fp32, "
        f"{', '.join(packages)}. Each problem has a target model that was taught all rows, and two oracles "
        "that never saw the forget set. Distances are to be read against the oracles' own, the floor. Settings were "
        "chosen on authors-0; the other problems are tests.",
        "",
        "| method | settings beside the `demo` preset's |",
        "|---|---|",
    ]
    for method in methods_in(outcomes):
        settings = " ".join(METHODS[method]).replace("|", "\\|")
        lines.append(f"| {method} | `{settings}` |")
    for outcome in outcomes:
        options = " ".join(PROBLEMS[outcome.problem])
        model = Path(MODELS.get(outcome.problem, SMOLLM)).name
        made = f"{model}, `make-data {options}`"
        lines += ["", f"## {outcome.problem}", "", made, "", *table(outcome)]
    lines += ["", "![Token distance left against what is kept, a point a run](suite.png)", ""]
    (DOCS / "suite.md").write_text("\n".join(lines), encoding="utf-8")
    draw(outcomes)


def methods_in(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the methods that have been run on any problem, in the table's order."""
    return [name for name in METHODS if any(name in outcome.scores for outcome in outcomes)]


def draw(outcomes: Sequence[Outcome]) -> None:
    """Draw what is left of the token distance, against the general knowledge that is kept."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for index, method in enumerate(methods_in(outcomes)):
        for outcome, marker in zip(outcomes, MARKERS, strict=False):
            if method not in outcome.scores:
                continue
            models = outcome.scores[method]["models"]
            left, kept = (
                models["after"][name] / models["before"][name]
                for name in ("forget.token_distance", "general.probability")
            )
            axes.scatter(left, kept, color=f"C{index}", marker=marker)
        axes.scatter([], [], color=f"C{index}", label=method)
    for outcome, marker in zip(outcomes, MARKERS, strict=False):
        axes.scatter([], [], color="gray", marker=marker, label=outcome.problem)
    axes.axvline(1, color="gray", linewidth=0.8)
    axes.set_xlabel("token distance to the oracles: after / before (0: none left; 1: untouched)")
    axes.set_ylabel("general probability: after / before")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(DOCS / "suite.png", dpi=110)


def main() -> None:
    """Run what is asked for and missing, and write the page after each problem."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", default=",".join(PROBLEMS))
    parser.add_argument("--methods", default=",".join(METHODS))
    options = parser.parse_args()
    for problem in options.problems.split(","):
        make(problem, options.methods.split(","))
        outcomes = [outcome for outcome in map(outcome_of, PROBLEMS) if outcome.scores]
        write(outcomes)
        print(f"{DOCS / 'suite.md'}: {len(outcomes)} problems", flush=True)


if __name__ == "__main__":
    main()
