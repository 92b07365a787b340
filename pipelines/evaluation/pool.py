"""Score models on all sets, on Ray workers.

One pool of workers scores all models in turn, so that a process starts once and holds one model at
a time. Rows leave the workers as numbers; no text comes back.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import ray
from ray.util import ActorPool
from ray.util.queue import Queue

from pipelines.cluster.messages import forwarded_messages
from pipelines.cluster.resources import worker_environment, workers_now
from pipelines.cluster.tasks import this_node
from pipelines.config.data import FORGOTTEN_SETS, KEPT_SETS
from pipelines.config.schema import ModelConfig, UnlearnConfig
from pipelines.data.sets import Sets
from pipelines.evaluation.entries import Evaluation, evaluation_of
from pipelines.evaluation.metrics.keys import IN_CONTEXT, InContext
from pipelines.evaluation.metrics.relearning import MOST_LEARNED
from pipelines.evaluation.score_cache import Piece, ScoreCache, Task, digest_of
from pipelines.evaluation.scored_model import (
    CHANGES,
    QUANTISED_SETS,
    Beside,
    Change,
    Relearned,
    ScoredModel,
    is_oracle,
)

if TYPE_CHECKING:
    from pipelines.evaluation.scorer import Samples, Scorer

ROWS_A_PIECE = 16
# Models whose robustness is measured, beside the oracles. The original has forgotten nothing.
ATTACKED_MODELS = ("after", "model")


class OtherRows(NamedTuple):
    """What attacks on the forget set take of other sets: rows to relearn, by set, and examples."""

    learned: Mapping[str, list[Piece]]
    shown: list[Piece]


def evaluate(
    cfg: UnlearnConfig, models: dict[str, ModelConfig], sets: Sets, advance: Callable[[int], None]
) -> Evaluation:
    """Return the scores of each model; call `advance` with the work that has been done.

    With models named as `oracle_names` has it, the metrics that compare with an oracle are there
    for all others. What was scored before is read from the user's cache.
    """
    # Cutting the sets needs CPUs, and the workers take all there are: sets first.
    others = OtherRows(_learned_pieces(cfg, sets), _shown_pieces(cfg, sets))
    tasks = _tasks(cfg, models, pieces_of(cfg, sets), others)
    cache = ScoreCache(cfg, models)
    samples: defaultdict[ScoredModel, Samples] = defaultdict(dict)
    waiting: list[Task] = []

    def add(of_task: "dict[ScoredModel, Samples]") -> None:
        for model, of_model in of_task.items():
            samples[model] |= of_model

    for task in tasks:
        known = cache.load(task)
        if known is None:
            waiting.append(task)
        else:
            add(known)
            advance(task.work)
    for index, of_task in _scored(cfg, models, waiting, advance):
        cache.save(waiting[index], of_task)
        add(of_task)
    for task in tasks:
        if task.reads_forgotten:
            cache.drop(task)
    return evaluation_of(samples, {name: _attacks_on(cfg, name) for name in models})


def _scored(
    cfg: UnlearnConfig,
    models: dict[str, ModelConfig],
    tasks: list[Task],
    advance: Callable[[int], None],
) -> "Iterator[tuple[int, dict[ScoredModel, Samples]]]":
    """Yield each task's index and samples as workers finish it; a relearning tells its steps."""
    if not tasks:
        return

    def start(worker: Any, index: int) -> Any:
        rows = [piece.rows for piece in tasks[index].pieces]
        return worker.score.remote(index, tasks[index].model, *rows)

    # On the driver's node, where the queue outlives the workers' nodes.
    steps = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": this_node()})
    with scoring_pool(cfg, models, steps) as pool, forwarded_messages(steps, advance):
        for index, samples in pool.map_unordered(start, range(len(tasks))):
            if not isinstance(tasks[index].model.change, Relearned):
                advance(tasks[index].work)
            yield index, samples


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


@contextmanager
def scoring_pool(
    cfg: UnlearnConfig, models: dict[str, ModelConfig], steps: Queue | None = None
) -> Iterator[Any]:
    """Yield a pool of actors of `_Worker` on the resources of the training's workers.

    They are as many as those, unless each takes more GPUs. Those that relearn tell `steps`.
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
    workers: list[Any] = [remote.remote(cfg, models, steps) for _ in range(number)]
    try:
        yield ActorPool(workers)
    finally:
        for worker in workers:  # nothing else gets their CPUs and GPUs before they are gone
            ray.kill(worker)


class _Worker:
    """The actor around a scorer; what a scorer imports is imported here, not on the driver."""

    def __init__(
        self, cfg: UnlearnConfig, models: dict[str, ModelConfig], steps: Queue | None
    ) -> None:
        from pipelines.evaluation.class_scorer import ClassScorer
        from pipelines.evaluation.text_scorer import TextScorer

        scorer = TextScorer if cfg.task == "causal_lm" else ClassScorer
        self._scorer: Scorer = scorer(cfg, models)
        if steps is not None:
            self._scorer.on_step = steps.put

    def score(
        self, index: int, model: ScoredModel, *pieces: pa.Table
    ) -> "tuple[int, dict[ScoredModel, Samples]]":
        rows = pa.concat_tables(pieces)
        if isinstance(model.change, Relearned):
            return index, self._scorer.relearn(model, rows)
        return index, {model: self._scorer.score(model, rows)}

    def answers(
        self, name: str, questions: pa.Table, start: int, limit: int
    ) -> tuple[pa.Table, int]:
        """Return some rows of (row, prompt) as (row, answer), and how many they are."""
        asked = questions.slice(start, limit)
        answers = pa.array(self._scorer.answers(name, asked["prompt"].to_pylist()), pa.string())
        return asked.select(["row"]).append_column("answer", answers), asked.num_rows


def _changes_of(cfg: UnlearnConfig, name: str, models: Collection[str]) -> list[Change]:
    """Return what else a model of this name is scored after or beside, of these models."""
    changes = _attacks_on(cfg, name)
    if cfg.task == "causal_lm":
        changes += [Beside(other) for other in models if is_oracle(other) and other != name]
        if "before" in models and name == "after":
            changes.append(Beside("before"))
    return changes


def _attacks_on(cfg: UnlearnConfig, name: str) -> list[Change]:
    """Return the changes that could bring back what a model of this name has forgotten."""
    if name not in ATTACKED_MODELS and not is_oracle(name):
        return []
    # leak_at_k changes nothing: it is scored with the model as it is.
    return [CHANGES[check] for check in cfg.evaluation.robustness if check in CHANGES]


def _sets_of(change: Change) -> tuple[str, ...]:
    """Return the sets that are scored after or beside a change, besides all."""
    if isinstance(change, InContext):
        return ("forget",)
    if isinstance(change, Beside):
        # Next-token distributions of what is, or was, forgotten are compared with the oracle's, and
        # those of what must stay with the original's.
        return FORGOTTEN_SETS if is_oracle(change.reference) else KEPT_SETS
    return QUANTISED_SETS


def _tasks(
    cfg: UnlearnConfig,
    models: Collection[str],
    pieces: Mapping[str, list[Piece]],
    others: OtherRows,
) -> list[Task]:
    """Return the longest tasks first, then model after model, so that a worker loads each once."""
    # A relearning is one task of many steps. Begun last, it would keep one worker busy alone.
    relearnings: list[Task] = []
    tasks: list[Task] = []
    for name in models:
        tasks += [Task(ScoredModel(name), [piece]) for piece in chain(*pieces.values())]
        for change in _changes_of(cfg, name, models):
            model = ScoredModel(name, change)
            if isinstance(change, Relearned):
                of_others = others.learned.get(change.by.learned, [])
                relearnings.append(Task(model, pieces["forget"] + of_others))
                continue
            shown = others.shown if isinstance(change, InContext) else []
            for set_name in _sets_of(change):
                tasks += [Task(model, [piece, *shown]) for piece in pieces.get(set_name, [])]
    return relearnings + tasks


def _rows_scored(cfg: UnlearnConfig, sets: Sets, name: str) -> int:
    return min(sets.counts[name], cfg.evaluation.max_rows or sets.counts[name])


def pieces_of(cfg: UnlearnConfig, sets: Sets) -> dict[str, list[Piece]]:
    """Return small tables of rows, by set, thinned to `evaluation.max_rows` a set."""
    return _cut(cfg, sets, {name: _rows_scored(cfg, sets, name) for name in sets.names()})


def _learned_pieces(cfg: UnlearnConfig, sets: Sets) -> dict[str, list[Piece]]:
    """Return the rows of other sets than the forget set that relearnings take, by set.

    These are as many as relearning on half of the forget set takes, at most MOST_LEARNED.
    """
    half = (_rows_scored(cfg, sets, "forget") + 1) // 2
    limits: dict[str, int] = {}
    for check in cfg.evaluation.robustness:
        change = CHANGES.get(check)
        if isinstance(change, Relearned) and change.by.learned != "forget":
            limits[change.by.learned] = min(half, MOST_LEARNED, sets.counts[change.by.learned])
    return _cut(cfg, sets, limits)


def _shown_pieces(cfg: UnlearnConfig, sets: Sets) -> list[Piece]:
    """Return the retained rows among which those are that forget questions are asked behind."""
    if IN_CONTEXT.name not in cfg.evaluation.robustness:
        return []
    return _cut(cfg, sets, {"retain": min(IN_CONTEXT.drawn, sets.counts["retain"])})["retain"]


def _cut(cfg: UnlearnConfig, sets: Sets, limits: Mapping[str, int]) -> dict[str, list[Piece]]:
    """Return small tables of so many rows of each of these sets."""
    size = max(ROWS_A_PIECE, cfg.evaluation.batch_size)

    @ray.remote
    def cut(name: str, block: pa.Table, count: int, limit: int) -> list[Piece]:
        row_N = block["row"].to_numpy()
        # True for `limit` of the numbers up to `count`, evenly, whichever block they lie in.
        is_scored_N = (row_N + 1) * limit // count > row_N * limit // count
        rows = block.filter(pa.array(is_scored_N))
        pieces: list[Piece] = []
        for start in range(0, rows.num_rows, size):
            piece = rows.slice(start, size)
            # A reference, because the driver, which gets the result, holds no text.
            pieces.append(Piece(name, ray.put(piece), piece.num_rows, digest_of(piece)))
        return pieces

    cuts: dict[str, list[Any]] = {}
    for name, rows in sets.items():
        if name not in limits:
            continue
        blocks = rows.to_arrow_refs()
        cuts[name] = [cut.remote(name, block, sets.counts[name], limits[name]) for block in blocks]
    # Awaited once all are submitted, so that sets are cut side by side.
    return {name: list(chain(*ray.get(waiting))) for name, waiting in cuts.items()}
