"""Score models on all sets, on Ray workers.

One pool of workers scores all models in turn, so that a process starts once and holds one model at
a time. Rows leave the workers as numbers; no text comes back.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Container, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import ray
from ray.util import ActorPool

from pipelines.cluster.resources import worker_environment, workers_now
from pipelines.config.schema import ModelConfig, UnlearnConfig
from pipelines.data.sets import Sets
from pipelines.evaluation.metrics import Sample, relearn_scores, summarise
from pipelines.evaluation.metrics.keys import Rounding
from pipelines.evaluation.metrics.relearning import STEPS
from pipelines.evaluation.scored_model import CHANGES, Beside, Change, Relearned, ScoredModel

if TYPE_CHECKING:
    from pipelines.evaluation.scorer import Samples, Scorer

ROWS_A_PIECE = 16
# Models whose robustness is measured, by name. The original has forgotten nothing.
ATTACKED_MODELS = ("after", "model", "oracle")
QUANTISED_SETS = ("forget", "retain")  # sets that models of rounded weights are scored on
# Sets whose next-token distributions are compared with the oracle's, and with the original's.
FORGOTTEN_SETS = ("forget",)
KEPT_SETS = ("retain", "utility", "general")


class Task(NamedTuple):
    """A model, and references to tables of rows that a worker scores under it at a stretch."""

    model: ScoredModel
    rows: list[Any]


class Done(NamedTuple):
    """The samples that a task gives, and how much of `evaluation_work` it was."""

    samples: "dict[ScoredModel, Samples]"
    work: int


def evaluate(
    cfg: UnlearnConfig, models: dict[str, ModelConfig], sets: Sets, advance: Callable[[int], None]
) -> dict[str, dict[str, float | None]]:
    """Return the scores of each model, by key; call `advance` with the work that has been done.

    With a model named `oracle`, the metrics that compare with it are there for the others.
    """

    def start(worker: Any, task: Task) -> Any:
        return worker.score.remote(task.model, *task.rows)

    # Cutting the sets needs CPUs, and the workers take all there are: sets first.
    tasks = _tasks(cfg, models, pieces_of(cfg, sets))
    pool: Any = ActorPool(start_workers(cfg, models))
    samples: defaultdict[ScoredModel, Samples] = defaultdict(dict)
    for done in pool.map_unordered(start, tasks):
        for model, of_model in done.samples.items():
            samples[model] |= of_model
        advance(done.work)
    for model, of_model in samples.items():
        if isinstance(model.change, Beside):
            for row, distances in of_model.items():
                samples[ScoredModel(model.name)][row].update(distances)
    scores: dict[str, dict[str, float | None]] = {}
    for name in models:
        oracle = None
        if "oracle" in models and name != "oracle":
            oracle = _in_order(samples[ScoredModel("oracle")])
        scores[name] = summarise(_in_order(samples[ScoredModel(name)]), oracle)
        for change in _attacks_on(cfg, name):
            scores[name] |= _scores_of_change(ScoredModel(name, change), samples)
    return scores


def evaluation_work(cfg: UnlearnConfig, models: Collection[str], sets: Sets) -> int:
    """Return the work that `evaluate` reports in all: rows scored, and steps of relearning."""
    rows = {name: _rows_scored(cfg, sets, name) for name in sets.names()}
    work = 0
    for name in models:
        work += sum(rows.values())
        for change in _changes_of(cfg, name, models):
            if isinstance(change, Relearned):
                work += change.steps
            else:
                work += sum(rows.get(set_name, 0) for set_name in _sets_of(change))
    return work


def start_workers(cfg: UnlearnConfig, models: dict[str, ModelConfig]) -> list[Any]:
    """Start actors of `_Worker` on the resources of the training's workers.

    They are as many as those, unless each takes more GPUs.
    """
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
        from pipelines.evaluation.class_scorer import ClassScorer
        from pipelines.evaluation.text_scorer import TextScorer

        scorer = TextScorer if cfg.task == "causal_lm" else ClassScorer
        self._scorer: Scorer = scorer(cfg, models)

    def score(self, model: ScoredModel, *pieces: pa.Table) -> Done:
        rows = pa.concat_tables(pieces)
        if isinstance(model.change, Relearned):
            return Done(self._scorer.relearn(model.name, rows), work=model.change.steps)
        return Done({model: self._scorer.score(model, rows)}, work=rows.num_rows)

    def answers(
        self, name: str, questions: pa.Table, start: int, limit: int
    ) -> tuple[pa.Table, int]:
        """Return some rows of (row, prompt) as (row, answer), and how many they are."""
        asked = questions.slice(start, limit)
        answers = pa.array(self._scorer.answers(name, asked["prompt"].to_pylist()), pa.string())
        return asked.select(["row"]).append_column("answer", answers), asked.num_rows


def _changes_of(cfg: UnlearnConfig, name: str, models: Container[str]) -> list[Change]:
    """Return what else a model of this name is scored after or beside, of these models."""
    changes = _attacks_on(cfg, name)
    if cfg.task == "causal_lm":
        if "oracle" in models and name != "oracle":
            changes.append(Beside("oracle"))
        if "before" in models and name == "after":
            changes.append(Beside("before"))
    return changes


def _attacks_on(cfg: UnlearnConfig, name: str) -> list[Change]:
    """Return the changes that could bring back what a model of this name has forgotten."""
    if name not in ATTACKED_MODELS:
        return []
    return [CHANGES[change] for change in cfg.evaluation.robustness]


def _sets_of(change: Change) -> tuple[str, ...]:
    """Return the sets that are scored after or beside a change, besides all."""
    if isinstance(change, Beside):
        return FORGOTTEN_SETS if change.reference == "oracle" else KEPT_SETS
    return QUANTISED_SETS


def _tasks(
    cfg: UnlearnConfig, models: Collection[str], pieces: Mapping[str, list[Any]]
) -> list[Task]:
    """Return the longest tasks first, then model after model, so that a worker loads each once."""
    relearnings: list[Task] = []
    tasks: list[Task] = []
    for name in models:
        tasks += [Task(ScoredModel(name), [rows]) for rows in chain(*pieces.values())]
        for change in _changes_of(cfg, name, models):
            model = ScoredModel(name, change)
            if isinstance(change, Relearned):
                relearnings.append(Task(model, pieces["forget"]))
                continue
            for set_name in _sets_of(change):
                tasks += [Task(model, [rows]) for rows in pieces.get(set_name, [])]
    return relearnings + tasks


def _scores_of_change(
    model: ScoredModel, samples: "Mapping[ScoredModel, Samples]"
) -> dict[str, float | None]:
    """Return what a model's entry holds of a change that was made to it."""
    if isinstance(model.change, Rounding):
        scores: dict[str, float | None] = {}
        for key, value in summarise(_in_order(samples[model])).items():
            if key.partition(".")[0] in QUANTISED_SETS:
                scores[f"{model.change.name}.{key}"] = value
        return scores
    curve: dict[int, list[Sample]] = {}
    for step in STEPS:
        curve[step] = _in_order(samples[ScoredModel(model.name, Relearned(step))])
    held_out = samples[ScoredModel(model.name, Relearned(0))]
    before = samples[ScoredModel("before")]
    original = {row: sample for row, sample in before.items() if row in held_out}
    return relearn_scores(curve, _in_order(original) if before else None)


def _in_order(samples: "Samples") -> list[Sample]:
    return [samples[row] for row in sorted(samples)]


def _rows_scored(cfg: UnlearnConfig, sets: Sets, name: str) -> int:
    return min(sets.counts[name], cfg.evaluation.max_rows or sets.counts[name])


def pieces_of(cfg: UnlearnConfig, sets: Sets) -> dict[str, list[Any]]:
    """Return references to small tables of rows, by set, thinned to `evaluation.max_rows` a set."""
    cut = ray.remote(_cut)
    size = max(ROWS_A_PIECE, cfg.evaluation.batch_size)
    cuts: dict[str, list[Any]] = {}
    for name, rows in sets.items():
        limit = _rows_scored(cfg, sets, name)
        blocks = rows.to_arrow_refs()
        cuts[name] = [cut.remote(block, sets.counts[name], limit, size) for block in blocks]
    return {name: list(chain(*ray.get(waiting))) for name, waiting in cuts.items()}


def _cut(block: pa.Table, count: int, limit: int, size: int) -> list[Any]:
    """Return references to small tables of a block's rows, evenly `limit` of the set's `count`."""
    row_N = block["row"].to_numpy()
    is_scored_N = (row_N + 1) * limit // count > row_N * limit // count
    rows = block.filter(pa.array(is_scored_N))
    return [ray.put(rows.slice(start, size)) for start in range(0, rows.num_rows, size)]
