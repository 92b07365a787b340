"""Both papers' experiments on real data: PruneLoRA (arXiv 2411.11907) and RFA (arXiv 2411.08443), all arms, in one go.

Usage: python -m tests.benchmarks.papers [--seeds 0,1,2] [--problems vit-class,...] [--arms prunelora,...] [--out FILE]

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
from typing import Any

import ray

from pipelines.cluster.resources import worker_environment
from pipelines.cluster.session import session
from pipelines.config.load import load_config
from pipelines.config.schema import ModelConfig, UnlearnConfig
from pipelines.preflight import preflight
from pipelines.storage.run_folder import RunFolder
from pipelines.terminal import Terminal
from pipelines.unlearn import finetune, score, train
from tests.benchmarks.paper_arms import ARMS, OF_CLASSIFIERS, PROBLEMS, SLOWEST, Arm, Problem
from tests.benchmarks.paper_data import fashion_mnist, fortunes, fresh_model, movie_reviews
from tests.benchmarks.papers_page import Result, write

FOLDER = Path("outputs/papers").absolute()
DOCS = Path(__file__).parents[2] / "docs" / "papers.md"


def configure(problem: Problem, seed: int, arm: Arm | None, name: str, rows: int) -> UnlearnConfig:
    """The configuration of one arm (of the target, without one); the retain set has so many `rows`."""
    folder = FOLDER / name_of(problem) / str(seed)
    fresh = fresh_model(problem.model, FOLDER, seed)
    start = fresh if arm is None or arm.start == "fresh" else folder / "target" / "model"
    changes = [
        f"model.path={start}",
        f"output_dir={folder / slug(name)}",
        f"seed={seed}",
        f"data.share_seed={seed}",
    ]
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
    if problem.model in ("vit", "resnet"):
        folder = fashion_mnist(FOLDER)
        train, test = str(folder / "train.parquet"), str(folder / "test.parquet")
        utility = train
    else:
        folder = {"minilm": movie_reviews, "smollm": fortunes}[problem.model](FOLDER, seed)
        train, test = str(folder / "train.jsonl"), str(folder / "test.jsonl")
        utility = str(folder / "utility.jsonl") if problem.generates else train
    paths = {"forget": train, "retain": train, "general": test, "holdout": test, "utility": utility}
    named = {
        change.split(".")[1] for change in [*problem.changes, *own] if change.startswith("data.")
    }
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
        with session(cfg.train, run.path / "run.log", terminal):
            sets = preflight(cfg, "run", terminal, run=run).sets
            run.begin(sets.inputs())
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
        with (
            TemporaryDirectory() as scratch,
            session(cfg.train, Path(scratch) / "run.log", terminal),
        ):
            sets = preflight(cfg, "evaluate", terminal).sets
            scores = score(cfg, settled, sets, terminal)[0].models
        scores["retrain"] = scores.pop("oracle")
        record.write_text(json.dumps(scores, indent=1))
    return {name: {"scores": scores[name], "cost": cost} for name, cost in costs.items()}


def start_worker(cores: Any) -> None:
    """A core and a Ray of its own for a process that works cells off: two go side by side, each on one thread."""
    os.sched_setaffinity(0, {cores.get()})
    logging.disable()  # of Ray's
    # Idle processes are kept, with what they have imported; there are no other nodes to watch.
    os.environ.update(RAY_num_workers_soft_limit="8", RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="0")
    environment = {"env_vars": worker_environment(load_config("rfa_image", []).train)}
    ray.init(
        "local",
        num_cpus=2,
        object_store_memory=2**30,
        include_dashboard=False,
        runtime_env=environment,
    )


def main() -> None:
    """Run what is asked for, and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--problems", default=",".join(PROBLEMS))
    parser.add_argument("--arms", default=",".join(map(slug, ARMS)), help="retrain always runs")
    parser.add_argument("--out", type=Path, default=DOCS)
    options = parser.parse_args()
    started = time.monotonic()
    asked = [name for name in ARMS if slug(name) in ["retrain", *options.arms.split(",")]]
    keys, seeds = options.problems.split(","), [int(seed) for seed in options.seeds.split(",")]
    for problem, seed in (
        (PROBLEMS[key], seed) for key in keys for seed in seeds
    ):  # once, not in both processes
        sources(problem, seed)
        fresh_model(problem.model, FOLDER, seed)
    context = multiprocessing.get_context("spawn")
    cores, free = context.Queue(), sorted(os.sched_getaffinity(0))
    for core in free:
        cores.put(core)
    with ProcessPoolExecutor(len(free), context, start_worker, (cores,)) as pool:
        slowest_first = sorted(
            keys, key=lambda key: SLOWEST.index(PROBLEMS[key].model)
        )  # so that both end together
        cells = {
            (key, seed): pool.submit(cell, key, seed, asked)
            for key in slowest_first
            for seed in seeds
        }
        for done in as_completed(cells.values()):
            if done.exception():
                pool.shutdown(cancel_futures=True)  # what is trained need not be trained again
            done.result()
    results = []
    for key in keys:
        of_seeds = [cells[key, seed].result() for seed in seeds]
        results.append(
            Result(PROBLEMS[key], {name: [own[name] for own in of_seeds] for name in of_seeds[0]})
        )
    write(options.out, results, options.seeds, len(free))
    print(f"{options.out}: {(time.monotonic() - started) / 60:.0f} min")


if __name__ == "__main__":
    main()
