"""Scores of models on all sets, on Ray workers.

One pool of workers scores all models in turn, so that a process starts once and holds one model at a time. Rows leave
the workers as numbers; no text comes back. What is done to a model to bring the forget set back
(`evaluation.robustness`) is one more model of the pool: `after:quantised_4bit`, `after:relearn`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pyarrow as pa
import ray
from ray.util import ActorPool

from pipelines.cluster.resources import worker_environment, workers_now
from pipelines.config.schema import ModelConfig, UnlearnConfig
from pipelines.data.sets import Sets
from pipelines.evaluation.metrics import Sample, relearn_scores, summarise
from pipelines.evaluation.metrics.relearning import STEPS

ROWS_A_PIECE = 16
ATTACKED_MODELS = (
    "after",
    "model",
    "oracle",
)  # models whose robustness is measured, by name; the original has forgotten nothing
QUANTISED_SETS = ("forget", "retain")  # sets that models of rounded weights are scored on

Found = list[tuple[str, int, dict[str, Any]]]  # set, row number and numbers of each row
Samples = dict[tuple[str, int], Sample]  # by set and row number


class Piece(NamedTuple):
    """A reference to a small table of rows of one set."""

    set_name: str
    rows: Any


class Task(NamedTuple):
    """What a worker does at a stretch: a method of it, the model's name, and rows."""

    method: str
    name: str
    rows: list[Any]


class Done(NamedTuple):
    """What a task gives: numbers by the name of a model, and how much of `evaluation_work` it was."""

    found: dict[str, Found]
    work: int


def evaluate(
    cfg: UnlearnConfig, models: dict[str, ModelConfig], sets: Sets, advance: Callable[[int], None]
) -> dict[str, dict[str, float | None]]:
    """Scores of each model, `set.metric` to number or None; `advance` is told of work as it is done.

    With a model named `oracle`, the metrics that compare with it are there for the others.
    """
    tasks = _tasks(cfg, models, pieces_of(cfg, sets))
    pool: Any = ActorPool(start_workers(cfg, models))
    samples: dict[str, Samples] = defaultdict(dict)
    for done in pool.map_unordered(_start, tasks):
        for name, found in done.found.items():
            samples[name] |= {(set_name, row): Sample(**fields) for set_name, row, fields in found}
        advance(done.work)
    ordered = {name: _in_order(samples[name]) for name in models}
    scores = {
        name: summarise(ordered[name], None if name == "oracle" else ordered.get("oracle"))
        for name in models
    }
    for name in _tried(models):
        scores[name] |= _robustness_scores(name, cfg.evaluation.robustness, samples)
    return scores


def evaluation_work(cfg: UnlearnConfig, models: Iterable[str], sets: Sets) -> int:
    """What `advance` will have been told in all: rows scored under each model, and steps of relearning."""
    names, counts = list(models), {name: _rows_scored(cfg, sets, name) for name in sets.names()}
    rounded = sum(counts[name] for name in QUANTISED_SETS)
    each = sum(
        STEPS[-1] if change == "relearn" else rounded for change in cfg.evaluation.robustness
    )
    return len(names) * sum(counts.values()) + len(_tried(names)) * each


def start_workers(cfg: UnlearnConfig, models: dict[str, ModelConfig]) -> list[Any]:
    """Actors of `_Worker` on the resources of the training's workers: as many, unless each takes more GPUs."""
    train = cfg.train
    gpus = cfg.evaluation.gpus_per_worker or train.gpus_per_worker
    number = workers_now(train)
    if train.gpus_per_worker:
        number = max(1, min(number, int(number * train.gpus_per_worker / gpus)))
    resources = {
        "num_cpus": train.cpus_per_worker,
        "num_gpus": gpus if train.gpus_per_worker else 0,
    }
    environment = {"env_vars": worker_environment(train)}
    remote = ray.remote(_Worker).options(**resources, runtime_env=environment)
    return [remote.remote(cfg, models) for _ in range(number)]


class _Worker:
    """The actor around a scorer; what a scorer imports is imported here, not on the driver."""

    def __init__(self, cfg: UnlearnConfig, models: dict[str, ModelConfig]) -> None:
        if cfg.task == "causal_lm":
            from pipelines.evaluation.text_scorer import Scorer
        else:
            from pipelines.evaluation.class_scorer import ClassScorer as Scorer

        self._scorer: Any = Scorer(cfg, models)

    def score(self, name: str, rows: pa.Table) -> Done:
        return Done({name: self._scorer.score(name, rows)}, work=rows.num_rows)

    def relearn(self, name: str, *pieces: pa.Table) -> Done:
        curve = self._scorer.relearn(name, pa.concat_tables(pieces))
        return Done({f"{name}:{step}": found for step, found in curve.items()}, work=STEPS[-1])

    def answers(
        self, name: str, questions: pa.Table, start: int, limit: int
    ) -> tuple[pa.Table, int]:
        """Some rows of (row, prompt) as (row, answer), and how many they are."""
        asked = questions.slice(start, limit)
        answers = self._scorer.answers(name, asked["prompt"].to_pylist())
        return asked.select(["row"]).append_column(
            "answer", pa.array(answers, pa.string())
        ), asked.num_rows


def _start(actor: Any, task: Task) -> Any:
    return getattr(actor, task.method).remote(task.name, *task.rows)


def _tasks(cfg: UnlearnConfig, models: Iterable[str], pieces: list[Piece]) -> list[Task]:
    """The longest first; then model after model, so that a worker loads each once."""
    tried, changes = _tried(models), cfg.evaluation.robustness
    forget = [piece.rows for piece in pieces if piece.set_name == "forget"]
    tasks = [Task("relearn", f"{name}:relearn", forget) for name in tried if "relearn" in changes]
    for name in models:
        tasks += [Task("score", name, [piece.rows]) for piece in pieces]
        for change in changes if name in tried else ():
            if change != "relearn":
                chosen = [piece.rows for piece in pieces if piece.set_name in QUANTISED_SETS]
                tasks += [Task("score", f"{name}:{change}", [rows]) for rows in chosen]
    return tasks


def _tried(models: Iterable[str]) -> list[str]:
    return [name for name in models if name in ATTACKED_MODELS]


def _robustness_scores(
    name: str, changes: Iterable[str], samples: dict[str, Samples]
) -> dict[str, float | None]:
    """What a model's entry holds of the changes that were made to it."""
    scores: dict[str, float | None] = {}
    for change in changes:
        if change == "relearn":
            curve = {step: samples[f"{name}:relearn:{step}"] for step in STEPS}
            original = {row: sample for row, sample in samples["before"].items() if row in curve[0]}
            by_step = {step: _in_order(own) for step, own in curve.items()}
            scores |= relearn_scores(by_step, _in_order(original) if samples["before"] else None)
        else:
            rounded = summarise(_in_order(samples[f"{name}:{change}"]))
            known = {
                key: value for key, value in rounded.items() if key.split(".")[0] in QUANTISED_SETS
            }
            scores |= {f"{change}.{key}": value for key, value in known.items()}
    return scores


def _in_order(samples: Samples) -> list[Sample]:
    return [samples[row] for row in sorted(samples)]


def _rows_scored(cfg: UnlearnConfig, sets: Sets, name: str) -> int:
    return min(sets.counts[name], cfg.evaluation.max_rows or sets.counts[name])


def pieces_of(cfg: UnlearnConfig, sets: Sets) -> list[Piece]:
    """All sets, thinned evenly to `evaluation.max_rows` a set."""
    cut = ray.remote(_cut)
    blocks = [(name, block) for name, rows in sets.items() for block in rows.to_arrow_refs()]
    size = max(ROWS_A_PIECE, cfg.evaluation.batch_size)
    limits = {name: _rows_scored(cfg, sets, name) for name in sets.names()}
    found = ray.get(
        [cut.remote(block, sets.counts[name], limits[name], size) for name, block in blocks]
    )
    return [
        Piece(name, piece)
        for (name, _), pieces in zip(blocks, found, strict=True)
        for piece in pieces
    ]


def _cut(block: pa.Table, count: int, limit: int, size: int) -> list[Any]:
    keep = [(row + 1) * limit // count > row * limit // count for row in block["row"].to_pylist()]
    rows = block.filter(pa.array(keep, pa.bool_()))
    return [ray.put(rows.slice(start, size)) for start in range(0, rows.num_rows, size)]
