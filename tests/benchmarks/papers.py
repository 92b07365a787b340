"""Both papers' experiments on real data: PruneLoRA (arXiv 2411.11907) and RFA (arXiv 2411.08443), all arms, in one go.

Usage: python -m tests.benchmarks.papers [--seeds 3] [--problems vit-class,...] [--arms rfa,...] [--out docs/papers.md]

Every arm is the product's own `finetune` or `run` with other settings; a model that is there already is not made again.
"""

import argparse
import json
import logging
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import ray

from pipelines.artifact import RunFolder
from pipelines.config import ModelConfig, UnlearnConfig
from pipelines.config_file import load_config
from pipelines.console import Terminal
from pipelines.trainer import worker_environment
from pipelines.unlearn import finetune, load_checked, score, session, train
from tests.benchmarks.paper_data import fashion_mnist, fortunes, fresh_model, movie_reviews
from tests.benchmarks.papers_page import bounds, table, write

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
    "RFA, by gradient": Arm("run", [*OFF, "objective.weights.task=1"], epochs=0.5),
    "gradient ascent": Arm("run", [*NO_RFA, "objective.weights.output=1", "objective.output=ascent"], epochs=0.15),
    "random labels": Arm("run", [*NO_RFA, *weights(task=1, output=1), "objective.output=random_label"], epochs=0.5),
    "bad teacher": Arm("run", [*NO_RFA, *weights(kl=1, output=1), "objective.output=bad_teacher"], epochs=0.5),
    "SalUn": Arm("finetune", ["finetune.sets=[retain]", "finetune.epochs=1", "finetune.salient=0.5"]),
    "SCRUB": Arm("run", [*NO_RFA, *weights(kl=1, task=1, output=0.1), "objective.output=scrub"], epochs=0.5),
}
OF_CLASSIFIERS = ("random labels", "bad teacher", "SalUn")  # arms that a language model is spared


class Problem(NamedTuple):
    """A model, data, and what of it must go."""

    title: str
    preset: str
    model: str
    changes: list[str]
    arms: dict[str, list[str]]  # more changes of single arms, by name
    generates: bool = False  # text: no bounds, and other columns
    passes: float = 1.0  # times the arms' epochs: more where rows are few
    apart: float = 0.0  # points that the forget set's accuracy may lie from retraining's; 0 where a class must go
    under: float = 1.0  # points that RA and TA may lie under retraining's


def arms_of(lora: list[str], pruned: list[str]) -> dict[str, list[str]]:
    """What the paper's arms prune and adapt in a model; all others adapt what its preset says."""
    return {"LoRA on retain": lora, "PruneLoRA": [*lora, *pruned], "prune + fine-tune": pruned}


VIT_LORA = [
    "adapter.targets=[o_proj, classifier]", "adapter.rank=16", "adapter.alpha=32", "adapter.dropout=0.1",
    "train.learning_rate=0.001",
]  # fmt: skip
# A head's pruned rows are classes that could never be told again: merging fills them, as in the paper's own code.
# Fine-tuning would keep them pruned.
VIT_PRUNED = ["prune.targets=[layers.3.attention.o_proj, classifier]", "prune.keep_sparsity=false"]
VIT = {**arms_of(VIT_LORA, VIT_PRUNED), "prune + fine-tune": ["prune.targets=[layers.3.attention.o_proj]"]}
LAST_STAGE = ", ".join(f"stages.2.layers.0.layer.{index}.convolution" for index in (0, 1))
CONVOLUTION_LORA = ["adapter.rank=8", "adapter.alpha=16", "train.learning_rate=0.01"]
STAGE_LORA = [f"adapter.targets=[{LAST_STAGE}, classifier.1]", *CONVOLUTION_LORA]
STAGE_PRUNED = [f"prune.targets=[{LAST_STAGE}]", "prune.keep_sparsity=false"]
RESNET = arms_of(STAGE_LORA, STAGE_PRUNED)  # as the ViT: half of all filters is more than so small a ResNet can repair
ALL_LORA = ["adapter.targets=[convolution, classifier.1]", *CONVOLUTION_LORA]
ALL_PRUNED = ["prune.targets=[convolutions]", "prune.keep_sparsity=false"]
ENCODER_RATE = ["adapter.rank=8", "adapter.alpha=16", "train.learning_rate=0.002"]
ENCODER_LORA = ["adapter.targets=[output.dense, classifier]", *ENCODER_RATE]
ENCODER = {
    **arms_of(ENCODER_LORA, ["prune.targets=[output.dense]"]),
    "RFA, one pass": ["data.utility.share=[0.5, 1]", "data.utility.max_rows=2700"],
    "RFA, by gradient": ["adapter.targets=[output.dense, pooler.dense, classifier]", *ENCODER_RATE, "train.steps=84"],
    "random labels": ["objective.weights.output=0.1"],  # of two classes the other is the wrong one: 1 broke the model
}
# Without half of its rows a language model cannot be repaired in a few steps, and forgets nothing particular: the
# product's own way, Wanda with RFA's terms. Ninety kept texts make few steps, so these are long, and none warms up.
GENERATOR_PRUNED = ["prune.targets=[o_proj, down_proj]", "prune.method=wanda", "prune.sparsity=0.3"]
COLD = ["train.warmup_steps=0", "train.learning_rate=0.003"]
GENERATOR_SHIFT = [*COLD, "train.learning_rate=0.01", "train.steps=20", *weights(retain=1, forget=10, task=1)]
GENERATOR = {
    "prune + fine-tune": GENERATOR_PRUNED,
    "LoRA on retain": COLD,
    "PruneLoRA": [*GENERATOR_PRUNED, *GENERATOR_SHIFT],
    "RFA, one pass": ["data.utility.max_rows=120"],
    "RFA, by gradient": GENERATOR_SHIFT,
    "gradient ascent": [*COLD, "train.steps=12"],
    "SCRUB": [*COLD, "train.steps=14", "objective.weights.output=1"],
}
HEAD_RATE = "train.learning_rate=0.02"  # of all that adapts a small classifier's head
BY_CLASS = [HEAD_RATE, "data.forget.max_rows=1400", "data.retain.max_rows=12600", "finetune.epochs=8"]
WHOLE = [f"data.{name}.{change}" for name in ("forget", "retain", "general") for change in ("column=null", "values=[]")]
BY_ROW = [
    *WHOLE, HEAD_RATE, "data.forget.share=[0, 0.05]", "data.retain.share=[0.05, 0.5]", "data.forget.max_rows=1000",
    "data.retain.max_rows=19000", "data.holdout.split=test", "data.holdout.max_rows=1000", "solve.strength=auto",
    "finetune.epochs=8",
]  # fmt: skip
HEAD = ["adapter.targets=[classifier.1]"]
# Single rows cannot be told apart in the head's inputs. By gradient, a shift of weight 1 or less forgets next to
# nothing (UA 4 %); shifted in all convolutions, kept rows are lost, too (RA 92 %); one pass over all broke the model.
# What the model says of unseen rows without their labels is held still, so that the shift is not theirs, too.
ROWS_RFA = [
    f"adapter.targets=[{LAST_STAGE}, classifier.1]", "data.utility.share=[0.5, 1]", "data.utility.max_rows=9500",
]  # fmt: skip
ROWS = {
    **arms_of(ALL_LORA, ALL_PRUNED),
    "PruneLoRA": [*ALL_LORA, *ALL_PRUNED, "train.steps=297"],  # 4 epochs
    "RFA, one pass": ROWS_RFA,
    "RFA, by gradient": [
        *ROWS_RFA, "adapter.rank=16", "adapter.alpha=32", "train.learning_rate=0.007",
        *weights(retain=0.1, forget=2.5, task=0, kl=1.5), "train.steps=222",  # 2 epochs
    ],
}  # fmt: skip
PROBLEMS = {
    "vit-class": Problem("Fashion-MNIST, a ViT forgets a class", "rfa_image", "vit", BY_CLASS, VIT),
    "resnet-class": Problem(
        "Fashion-MNIST, a ResNet forgets a class", "rfa_image", "resnet", [*BY_CLASS, *HEAD], RESNET
    ),
    "resnet-rows": Problem(
        "Fashion-MNIST, a ResNet forgets 5 % of its rows", "rfa_image", "resnet", [*BY_ROW, *HEAD],
        ROWS, apart=1.5,
    ),
    "reviews-rows": Problem(
        "Movie reviews, MiniLM forgets 10 % of rows", "rfa_text", "minilm",
        ["data.retain.max_rows=2700", "data.retain.share=[0.1, 0.5]", "data.forget.max_rows=300",
         "data.holdout.max_rows=300", "train.learning_rate=0.005", "finetune.epochs=3",
         "finetune.learning_rate=2.0e-4", "data.max_tokens=32", "data.general.split=train",
         "data.holdout.split=train", "evaluation.max_rows=1000"],
        ENCODER, apart=2.0, under=2.0,
    ),
    "fortunes-category": Problem(
        "Text generation: SmolLM2 forgets a category of short texts", "rfa_eli5", "smollm",
        ["data.columns={id: id, text: text, label: label}", "data.holdout.split=train", "data.general.split=train",
         *(f"data.{name}.column=label" for name in ("forget", "retain", "holdout", "general")),
         *(f"data.{name}.values=[food]" for name in ("forget", "holdout")),
         *(f"data.{name}.values=[law, education, literature]" for name in ("retain", "general")),
         "data.general.max_rows=60", "data.holdout.max_rows=30", "data.max_tokens=64", "finetune.epochs=5",
         "finetune.batch_size=16", "finetune.learning_rate=4.0e-4",
         "train.num_workers=1", "train.precision=bf16", "evaluation.quick=true", "objective.target=cluster_mean"],
        GENERATOR, generates=True, passes=2.0,
    ),
}  # fmt: skip

SLOWEST = ("smollm", "minilm", "vit", "resnet")  # by the minutes that a problem's arms take


def configure(problem: Problem, seed: int, arm: Arm | None, name: str, rows: int) -> UnlearnConfig:
    """The configuration of one arm (of the target, without one); the retain set has so many `rows`."""
    folder = FOLDER / name_of(problem) / str(seed)
    fresh = fresh_model(problem.model, FOLDER, seed)
    start = fresh if arm is None or arm.start == "fresh" else folder / "target" / "model"
    changes = [f"model.path={start}", f"output_dir={folder / slug(name)}", f"seed={seed}", f"data.share_seed={seed}"]
    changes += ["train.cpus_per_worker=1"]
    own = problem.arms.get(name, [])
    changes += [*problem.changes, *sources(problem, seed, own), *(arm.changes if arm else [])]
    if arm is not None and name != "retrain":
        batch_size = load_config(problem.preset, []).train.retain_batch_size
        changes += [f"train.steps={round(arm.epochs * problem.passes * rows / batch_size)}"]
    return load_config(problem.preset, [*changes, *own])


def sources(problem: Problem, seed: int, own: Sequence[str] = ()) -> list[str]:
    """Where the sets lie that a problem and an arm's `own` changes name: Fashion-MNIST's two splits, or files of
    texts."""
    texts = {"minilm": movie_reviews, "smollm": fortunes}.get(problem.model)
    if texts is None:
        train = test = utility = f"idx:{fashion_mnist(FOLDER)}"
    else:
        folder = texts(FOLDER, seed)
        train, test = str(folder / "train.jsonl"), str(folder / "test.jsonl")
        utility = str(folder / "utility.jsonl") if problem.generates else train
    paths = {"forget": train, "retain": train, "general": test, "holdout": test, "utility": utility}
    named = {change.split(".")[1] for change in [*problem.changes, *own] if change.startswith("data.")}
    needed = named | {"forget", "retain", "general"}
    return [f"data.{name}.path={path}" for name, path in paths.items() if name in needed]


def name_of(problem: Problem) -> str:
    return next(name for name, own in PROBLEMS.items() if own is problem)


def slug(name: str) -> str:
    return name.replace(", ", "-").replace(" + ", "-").replace(" ", "-").lower()


def make(cfg: UnlearnConfig, command: str) -> dict[str, Any]:
    """Train what an arm trains, as `ray-unlearn` does, unless it is there; returns the cost. Nothing is scored yet."""
    run = RunFolder(cfg, command)
    terminal = Terminal()
    if command == "finetune":
        return finetune(cfg, terminal).manifest()["cost"]
    if "cost" not in run.manifest():
        with session(cfg, run.path / "run.log", terminal):
            sets, _ = load_checked(cfg, terminal, {})
            run.begin(sets)
            train(run, sets, None, terminal)
    return run.manifest()["cost"]


def cell(key: str, seed: int, asked: list[str]) -> dict[str, dict[str, Any]]:
    """Scores and cost of the target and of all arms asked for, on one problem and seed: all are trained first, and then
    scored in one go, so that the models that all are compared with are scored once."""
    problem = PROBLEMS[key]
    asked = [name for name in asked if not (problem.generates and name in OF_CLASSIFIERS)]
    costs = {"before": make(configure(problem, seed, None, "target", 0), "finetune")}
    manifest = json.loads((FOLDER / key / str(seed) / "target" / "manifest.json").read_text())
    rows = manifest["sets"]["retain"]["rows"]
    settings = {name: configure(problem, seed, ARMS[name], name, rows) for name in asked}
    costs |= {name: make(cfg, ARMS[name].command) for name, cfg in settings.items()}
    folders = {"before": FOLDER / key / str(seed) / "target"}
    folders |= {name: Path(cfg.output_dir) for name, cfg in settings.items()}
    record = FOLDER / key / str(seed) / "scores.json"
    scores: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    made = max((folder / "manifest.json").stat().st_mtime for folder in folders.values())
    if not costs.keys() <= scores.keys() or record.stat().st_mtime < made:
        models = {"oracle": folders.pop("retrain"), **folders}
        settled = {name: ModelConfig(path=str(folder / "model")) for name, folder in models.items()}
        cfg, terminal = settings["retrain"], Terminal()
        with TemporaryDirectory() as scratch, session(cfg, Path(scratch) / "run.log", terminal):
            sets, _ = load_checked(cfg, terminal, settled)
            scores, _ = score(cfg, settled, sets, terminal)
        scores["retrain"] = scores.pop("oracle")
        record.write_text(json.dumps(scores, indent=1))
    return {name: {"scores": scores[name], "cost": cost} for name, cost in costs.items()}


def start_worker(cores: Any) -> None:
    """A core and a Ray of its own for a process that works cells off: two go side by side, each on one thread."""
    os.sched_setaffinity(0, {cores.get()})
    logging.disable()  # of Ray's
    os.environ.update(RAY_num_workers_soft_limit="8")  # idle processes are kept, with what they have imported
    environment = {"env_vars": worker_environment(load_config("rfa_image", []).train)}
    ray.init("local", num_cpus=2, object_store_memory=2**30, include_dashboard=False, runtime_env=environment)


def main() -> None:
    """Run what is asked for, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--problems", default=",".join(PROBLEMS))
    parser.add_argument("--arms", default=",".join(map(slug, ARMS)), help="retrain always runs")
    parser.add_argument("--out", type=Path, default=DOCS)
    options = parser.parse_args()
    started = time.monotonic()
    asked = [name for name in ARMS if slug(name) in ["retrain", *options.arms.split(",")]]
    keys, seeds = options.problems.split(","), [int(seed) for seed in options.seeds.split(",")]
    for problem, seed in ((PROBLEMS[key], seed) for key in keys for seed in seeds):  # once, not in both processes
        sources(problem, seed)
        fresh_model(problem.model, FOLDER, seed)
    context = multiprocessing.get_context("spawn")
    cores, free = context.Queue(), sorted(os.sched_getaffinity(0))
    for core in free:
        cores.put(core)
    with ProcessPoolExecutor(len(free), context, start_worker, (cores,)) as pool:
        slowest_first = sorted(keys, key=lambda key: SLOWEST.index(PROBLEMS[key].model))  # so that both end together
        cells = {(key, seed): pool.submit(cell, key, seed, asked) for key in slowest_first for seed in seeds}
        for done in as_completed(cells.values()):
            if done.exception():
                pool.shutdown(cancel_futures=True)  # what is trained need not be trained again
            done.result()
    sections = []
    for key in keys:
        problem, of_seeds = PROBLEMS[key], [cells[key, seed].result() for seed in seeds]
        found = {name: [own[name] for own in of_seeds] for name in of_seeds[0]}
        judged = [] if problem.generates else [*bounds(found, problem.apart, problem.under), ""]
        title = f"## {problem.title} (seeds {options.seeds})"
        sections.append("\n".join([title, "", *table(found, problem.generates), "", *judged]))
    write(options.out, sections, len(free))
    print(f"{options.out}: {(time.monotonic() - started) / 60:.0f} min")


if __name__ == "__main__":
    main()
