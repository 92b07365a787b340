"""Both papers' experiments on real data: PruneLoRA (arXiv 2411.11907) and RFA (arXiv 2411.08443), all arms, in one go.

Usage: python -m tests.benchmarks.papers [--seeds 3] [--problems vit-class,...] [--arms rfa,...] [--out docs/papers.md]

Every arm is the product's own `finetune` or `run` with other settings; a model that is there already is not made again.
"""

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import ray

from pipelines.config import UnlearnConfig
from pipelines.config_file import load_config
from pipelines.console import Terminal
from pipelines.trainer import worker_environment
from pipelines.unlearn import evaluate_model, finetune, unlearn
from tests.benchmarks.paper_data import fashion_mnist, fresh_model, movie_reviews

FOLDER = Path("outputs/papers").absolute()
DOCS = Path(__file__).parents[2] / "docs" / "papers.md"
OFF = ["solve.mode=off"]
NO_RFA = [*OFF, "objective.weights.retain=0", "objective.weights.forget=0"]


def weights(**values: float) -> list[str]:
    """Weights of the objective's terms, as changes."""
    return [f"objective.weights.{name}={value}" for name, value in values.items()]


class Arm(NamedTuple):
    """One method: `finetune` trains all parameters from the fresh model or the target, `run` unlearns the target."""

    command: str
    changes: list[str]
    start: str = "target"
    epochs: float = 0.0  # of the retain set, in steps of `run`


ARMS = {
    "retrain": Arm("finetune", ["finetune.sets=[retain]"], start="fresh"),
    "fine-tune on retain": Arm("finetune", ["finetune.sets=[retain]", "finetune.epochs=1"]),
    "prune + fine-tune": Arm("finetune", ["finetune.sets=[retain]", "finetune.epochs=1", "prune.method=rows"]),
    "LoRA on retain": Arm("run", [*NO_RFA, "objective.weights.task=1"], epochs=1),
    "PruneLoRA": Arm("run", [*NO_RFA, "objective.weights.task=1", "prune.method=rows"], epochs=2),
    "RFA, one pass": Arm("run", []),
    "RFA, by gradient": Arm("run", [*OFF, "objective.weights.task=1", "train.learning_rate=0.02"], epochs=0.5),
    "gradient ascent": Arm("run", [*NO_RFA, "objective.weights.output=1", "objective.output=ascent"], epochs=0.05),
    "random labels": Arm("run", [*NO_RFA, *weights(task=1, output=1), "objective.output=random_label"], epochs=0.5),
    "bad teacher": Arm("run", [*NO_RFA, *weights(kl=1, output=1), "objective.output=bad_teacher"], epochs=0.5),
    "SalUn": Arm("finetune", ["finetune.sets=[retain]", "finetune.epochs=1", "finetune.salient=0.5"]),
    "SCRUB": Arm("run", [*NO_RFA, *weights(kl=1, task=1, output=0.1), "objective.output=scrub"], epochs=0.5),
}


class Problem(NamedTuple):
    """A model, data, and what of it must go."""

    title: str
    preset: str
    model: str
    changes: list[str]
    arms: dict[str, list[str]]  # more changes of single arms, by name
    apart: float = 0.0  # points that the forget set's accuracy may lie from retraining's; 0 where a class must go
    under: float = 1.0  # points that RA and TA may lie under retraining's


VIT_LORA = ["adapter.targets=[o_proj, classifier]", "adapter.rank=16", "adapter.alpha=32", "adapter.dropout=0.1"]
# A head's pruned rows are classes that could never be told again: merging fills them, as in the paper's own code.
VIT_PRUNED = ["prune.targets=[layers.3.attention.o_proj, classifier]", "prune.keep_sparsity=false"]
CONVOLUTION_LORA = ["adapter.targets=[convolution, classifier.1]", "adapter.rank=8", "adapter.alpha=16"]
ALL_CONVOLUTIONS = [*CONVOLUTION_LORA, "train.learning_rate=0.01"]
CONVOLUTIONS_PRUNED = ["prune.targets=[convolutions]", "prune.keep_sparsity=false"]
ENCODER_LORA = ["adapter.targets=[attention.output.dense, classifier]", "adapter.rank=8", "adapter.alpha=16"]
ENCODER_PRUNED = ["prune.targets=[layer.5.attention.output.dense]"]


def arms_of(lora: list[str], pruned: list[str]) -> dict[str, list[str]]:
    """What the paper's arms prune and adapt in a model; all others adapt what its preset says."""
    return {"LoRA on retain": lora, "PruneLoRA": [*lora, *pruned], "prune + fine-tune": pruned}


VIT, RESNET = arms_of(VIT_LORA, VIT_PRUNED), arms_of(ALL_CONVOLUTIONS, CONVOLUTIONS_PRUNED)
BY_CLASS = ["data.forget.max_rows=2000", "data.retain.max_rows=18000", "finetune.epochs=8"]
WHOLE = [f"data.{name}.{change}" for name in ("forget", "retain", "general") for change in ("column=null", "values=[]")]
BY_ROW = [
    *WHOLE, "data.forget.share=[0, 0.05]", "data.retain.share=[0.05, 1]", "data.forget.max_rows=1000",
    "data.retain.max_rows=19000", "data.holdout.split=test", "data.holdout.max_rows=1000", "solve.strength=auto",
    "finetune.epochs=8",
]  # fmt: skip
HEAD = ["adapter.targets=[classifier.1]"]
# Single rows cannot be told apart in the head's inputs alone; in all convolutions the model broke (RA 20 %).
LAST_STAGE = [f"stages.2.layers.0.layer.{index}.convolution" for index in (0, 1)]
ROWS_RFA = {"RFA, one pass": [f"adapter.targets=[{', '.join(LAST_STAGE)}, classifier.1]"]}
PROBLEMS = {
    "vit-class": Problem("Fashion-MNIST, a ViT forgets a class", "rfa_image", "vit", BY_CLASS, VIT),
    "resnet-class": Problem(
        "Fashion-MNIST, a ResNet forgets a class", "rfa_image", "resnet", [*BY_CLASS, *HEAD], RESNET
    ),
    "resnet-rows": Problem(
        "Fashion-MNIST, a ResNet forgets 5 % of its rows", "rfa_image", "resnet", [*BY_ROW, *HEAD],
        {**RESNET, **ROWS_RFA}, apart=1.5
    ),
    "reviews-rows": Problem(
        "Movie reviews, MiniLM forgets 10 % of rows", "rfa_text", "minilm",
        ["data.retain.max_rows=4500", "data.forget.max_rows=500", "data.holdout.max_rows=500", "data.max_tokens=48",
         "data.general.split=train", "data.holdout.split=train", "train.cpus_per_worker=2"],
        arms_of(ENCODER_LORA, ENCODER_PRUNED), apart=2.0, under=2.0,
    ),
}  # fmt: skip


def configure(problem: Problem, seed: int, arm: Arm | None, name: str, rows: int) -> UnlearnConfig:
    """The configuration of one arm (of the target, without one); the retain set has so many `rows`."""
    folder = FOLDER / problem_name(problem) / str(seed)
    fresh = fresh_model(problem.model, FOLDER, seed)
    start = fresh if arm is None or arm.start == "fresh" else folder / "target" / "model"
    changes = [f"model.path={start}", f"output_dir={folder / slug(name)}", f"seed={seed}", f"data.share_seed={seed}"]
    changes += [*problem.changes, *sources(problem, seed), *(arm.changes if arm else []), *problem.arms.get(name, [])]
    if arm is not None and name != "retrain":
        changes.append(
            f"train.steps={round(arm.epochs * rows / load_config(problem.preset, []).train.retain_batch_size)}"
        )
        changes.append(f"evaluation.oracle={folder / 'retrain' / 'model'}")
    return load_config(problem.preset, changes)


def sources(problem: Problem, seed: int) -> list[str]:
    """Where the sets lie: Fashion-MNIST's two splits, or two files of reviews."""
    if problem.model == "minilm":
        folder = movie_reviews(FOLDER, seed)
        train, test = str(folder / "train.jsonl"), str(folder / "test.jsonl")
    else:
        train = test = f"idx:{fashion_mnist(FOLDER)}"
    names = {"forget": train, "retain": train, "general": test}
    if any(change.startswith("data.holdout") for change in problem.changes):
        names["holdout"] = test
    return [f"data.{name}.path={path}" for name, path in names.items()]


def problem_name(problem: Problem) -> str:
    return next(name for name, own in PROBLEMS.items() if own is problem)


def slug(name: str) -> str:
    return name.replace(", ", "-").replace(" + ", "-").replace(" ", "-").lower()


def run_arm(problem: Problem, seed: int, name: str, arm: Arm | None, rows: int) -> dict[str, Any]:
    """Scores and cost of one arm; what has been run before is read."""
    cfg = configure(problem, seed, arm, name, rows)
    record = Path(f"{cfg.output_dir}.json")
    if record.exists():
        return json.loads(record.read_text())
    terminal = Terminal()
    if arm is not None and arm.command == "run":
        run = unlearn(cfg, terminal)
        found = {"scores": run.scores()["models"]["after"], "cost": run.scores()["cost"]}
        found["before"] = run.scores()["models"]["before"]
    else:
        run = finetune(cfg, terminal)
        scores = evaluate_model(cfg, cfg.model.model_copy(update={"path": str(run.path / "model")}), terminal)
        found = {"scores": scores["model"], "cost": run.manifest()["cost"]}
    record.write_text(json.dumps(found, indent=1))
    return found


HEADER = """# The papers' experiments on real data

Written by `{command}`; `make papers` runs all problems and arms.
UA = 100 - accuracy on the forget set, RA = accuracy on
the retain set, TA = accuracy on test rows (without the forgotten class), MIA efficacy = share of the forget set that an
attack calls unseen; at most 5,000 rows of a set are scored. Distances are to the retrained model, on the forget set.
`training s`: everything but evaluation, starting the worker included. Mean over the seeds, plus or minus half their
range. As good as retraining, by the means, and how far from it: UA at least 99 % (rows: within 1.5 points, reviews 2),
RA and TA no more than 1 point lower (reviews 2), MIA efficacy within 5 points, under half of the seconds.
Sizes are chosen for two CPU cores: models of 0.3 M parameters (MiniLM: 22.7 M), 20,000 rows of Fashion-MNIST.
"""
PAPER = """## The paper's own figures

Mittal 2024 (arXiv 2411.11907), CIFAR-10, class 3 forgotten, 5 epochs, percent:

| | UA | MIA efficacy | RA | TA |
|---|---:|---:|---:|---:|
| ResNet-50, retrain | 100 | 100 | 98.02 | 96.70 |
| ResNet-50, PruneLoRA | 99.78 | 97.68 | 97.96 | 95.18 |
| ViT, retrain | 100 | 100 | 96.90 | 84.92 |
| ViT, PruneLoRA | 100 | 100 | 97.39 | 85.53 |
"""
COLUMNS = {
    "UA %": lambda own: 100 * (1 - own["scores"]["forget.accuracy"]),
    "RA %": lambda own: 100 * own["scores"]["retain.accuracy"],
    "TA %": lambda own: 100 * own["scores"]["general.accuracy"],
    "MIA efficacy %": lambda own: 100 * own["scores"]["mia_efficacy"],
    "activation distance": lambda own: own["scores"].get("activation_distance") or 0.0,
    "feature distance": lambda own: own["scores"].get("feature_distance") or 0.0,
    "training s": lambda own: own["cost"]["train_s"] + own["cost"]["solve_s"],
    "trained parameters": lambda own: own["cost"]["trained_parameters"],
    "sparsity": lambda own: own["cost"].get("sparsity", 0.0),
    "peak GiB": lambda own: own["cost"]["peak_memory_bytes"] / 2**30,
}


def table(found: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """Arms by columns: mean, and half the range over the seeds."""
    yield f"| | {' | '.join(COLUMNS)} |"
    yield f"|---|{'---:|' * len(COLUMNS)}"
    for name, runs in found.items():
        cells = []
        for column in COLUMNS.values():
            values = [float(column(own)) for own in runs]
            spread = (max(values) - min(values)) / 2
            digits = 0 if values[0] >= 500 else 1 if values[0] >= 10 else 3
            cells.append(f"{statistics.mean(values):,.{digits}f}" + (f" ± {spread:.{digits}f}" if spread else ""))
        yield f"| {name} | {' | '.join(cells)} |"


def bounds(problem: Problem, found: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """What an arm must reach to be called as good as retraining, and whether its mean does."""
    mean = {
        name: {key: statistics.mean(float(column(own)) for own in runs) for key, column in COLUMNS.items()}
        for name, runs in found.items()
    }
    oracle = mean["retrain"]
    yield "| as good as retraining? | UA | RA | TA | MIA efficacy | seconds |"
    yield "|---|---|---|---|---|---|"
    for name, own in mean.items():
        if name in ("before", "retrain"):
            continue
        gap = {key: own[key] - oracle[key] for key in COLUMNS}
        share = own["training s"] / oracle["training s"]
        forgets = abs(gap["UA %"]) <= problem.apart if problem.apart else own["UA %"] >= 99
        tests = [
            (forgets, f"{gap['UA %']:+.1f}"),
            (gap["RA %"] >= -problem.under, f"{gap['RA %']:+.1f}"),
            (gap["TA %"] >= -problem.under, f"{gap['TA %']:+.1f}"),
            (abs(gap["MIA efficacy %"]) <= 5, f"{gap['MIA efficacy %']:+.1f}"),
            (share < 0.5, f"{share:.0%}"),
        ]
        yield f"| {name} | " + " | ".join(f"{'held' if held else '**missed**'}, {text}" for held, text in tests) + " |"


def main() -> None:
    """Run what is asked for, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--problems", default=",".join(PROBLEMS))
    parser.add_argument("--arms", default=",".join(map(slug, ARMS)), help="retrain always runs")
    parser.add_argument("--out", type=Path, default=DOCS)
    options = parser.parse_args()
    asked = [name for name in ARMS if slug(name) in ["retrain", *options.arms.split(",")]]
    cfg = load_config("rfa_image", [])
    ray.init("local", include_dashboard=False, runtime_env={"env_vars": worker_environment(cfg.train)})
    sections = []
    for key in options.problems.split(","):
        problem = PROBLEMS[key]
        found: dict[str, list[dict[str, Any]]] = {}
        for seed in map(int, options.seeds.split(",")):
            found.setdefault("before", []).append(run_arm(problem, seed, "target", None, 0))
            manifest = json.loads((FOLDER / key / str(seed) / "target" / "manifest.json").read_text())
            rows = manifest["sets"]["retain"]["rows"]
            for name in asked:
                found.setdefault(name, []).append(run_arm(problem, seed, name, ARMS[name], rows))
                print("\n".join(table(found)), flush=True)
        title = f"## {problem.title} (seeds {options.seeds})"
        sections.append("\n".join([title, "", *table(found), "", *bounds(problem, found), ""]))
        write(options.out, sections)


def write(path: Path, sections: list[str]) -> None:
    """The page, with the sections that are there."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "ray", "deepspeed", "peft", "transformers"))
    machine = f"{platform.machine()}, 2 threads, {versions}."
    header = HEADER.format(command=" ".join(["python -m tests.benchmarks.papers", *sys.argv[1:]]))
    path.write_text("\n".join([header, *sections, PAPER, machine]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
