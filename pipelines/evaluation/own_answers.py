"""Utility prompts without an answer get the model's own, greedy, from before unlearning.

What the model says by itself is what must not move, so its answer's tokens stand for that in the statistics and in
training. They are generated once and kept in the run's folder until it is complete: a run that goes on reads them.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions when it is imported)

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
from pyarrow import parquet
from ray.util import ActorPool

from pipelines.cluster.tasks import on_this_node, result_of
from pipelines.config.schema import UnlearnConfig
from pipelines.data.rows import SET_SCHEMA
from pipelines.data.sets import Sets, dataset_of
from pipelines.evaluation.pool import start_workers
from pipelines.storage.atomic import replacing
from pipelines.terminal import Terminal

FILE_NAME = "utility_answers.parquet"
DIGEST = b"questions_sha256"  # in the file's metadata: a set's own digest does not tell the order of its rows


def with_own_answers(cfg: UnlearnConfig, sets: Sets, folder: Path, terminal: Terminal) -> Sets:
    """The sets with an answer in every utility row, at most `evaluation.max_new_tokens` tokens of the model's own.

    The answers lie in the folder's `utility_answers.parquet` (row, answer). They are generated where it is missing or
    belongs to other questions, by actors of the training's resources, which are gone when this returns. An answer may
    be empty: the model ends at once.
    """
    if not sets.unanswered:
        return sets
    assert sets.utility is not None
    path = folder / FILE_NAME
    blocks = sets.utility.to_arrow_refs()
    found: list[Any] = [_questions.remote(block) for block in blocks]
    questions, counts = [table for table, _ in found], ray.get([count for _, count in found])
    if not result_of(on_this_node(holds_answers).remote(path, *questions)):
        bar = terminal.bar("Answering utility prompts", sets.unanswered)
        answers = _generate(cfg, list(zip(questions, counts, strict=True)), bar.advance)
        result_of(on_this_node(_write).remote(path, len(questions), *questions, *answers))
        bar.finish()
    answers = on_this_node(_read).remote(path)
    filled = dataset_of([_fill.remote(block, answers) for block in blocks])
    return replace(sets, utility=filled, unanswered=0)


def drop_answers(folder: Path) -> None:
    """Remove the kept answers of a run that is complete: the model that gave them knew the forget set."""
    (folder / FILE_NAME).unlink(missing_ok=True)


def answered_only(sets: Sets) -> Sets:
    """The sets without the utility rows that have no answer; without the utility set, where none has one."""
    if not sets.unanswered:
        return sets
    assert sets.utility is not None
    left = sets.counts["utility"] - sets.unanswered
    counts = {name: count for name, count in sets.counts.items() if name != "utility" or left}
    if not left:
        return replace(sets, utility=None, counts=counts, unanswered=0)
    rows = _answered.remote(*sets.utility.to_arrow_refs())
    return replace(
        sets, utility=dataset_of([rows]), counts={**counts, "utility": left}, unanswered=0
    )


def _generate(
    cfg: UnlearnConfig, questions: list[tuple[Any, int]], advance: Callable[[int], None]
) -> list[Any]:
    """References to tables of answers, in the questions' order; of the workers' results, the driver sees counts."""
    limit = cfg.evaluation.batch_size
    pieces = [(table, start) for table, count in questions for start in range(0, count, limit)]
    answers: list[Any] = []

    def start(worker: Any, piece: tuple[Any, int]) -> Any:
        found, count = worker.answers.options(num_returns=2).remote("before", *piece, limit)
        answers.append(found)
        return count

    workers = start_workers(cfg, {"before": cfg.model})
    pool: Any = ActorPool(workers)
    try:
        for count in pool.map_unordered(start, pieces):
            advance(count)
    finally:
        for worker in workers:  # nothing else gets their CPUs before they are gone
            ray.kill(worker)
    return answers


def _select_questions(block: pa.Table) -> tuple[pa.Table, int]:
    """Row number and prompt of each row without an answer, and how many they are."""
    rows = block.filter(pc.equal(block["answer"], "")).select(["row", "prompt"])
    return rows, rows.num_rows


def holds_answers(path: Path, *questions: pa.Table) -> bool:
    """Whether there is a file of the answers to these questions."""
    return path.exists() and (parquet.read_schema(path).metadata or {}).get(DIGEST) == _digest(
        questions
    )


def _write(path: Path, num_tables: int, *tables: pa.Table) -> None:
    """Write the answers, which follow after as many tables of questions, all at once or not at all."""
    questions, answers = tables[:num_tables], pa.concat_tables(tables[num_tables:])
    assert answers["row"].to_pylist() == pa.concat_tables(questions)["row"].to_pylist(), (
        "an answer a question"
    )
    with replacing(path) as partial:
        parquet.write_table(answers.replace_schema_metadata({DIGEST: _digest(questions)}), partial)


def _digest(questions: tuple[pa.Table, ...]) -> bytes:
    rows = pa.concat_tables(questions).to_pydict()
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest().encode()


def _read(path: Path) -> pa.Table:
    return parquet.read_table(path)


def _fill_in(block: pa.Table, answers: pa.Table) -> pa.Table:
    """The block with these answers in place of those of the rows that they name."""
    own = answers["answer"].take(
        pc.index_in(block["row"], value_set=answers["row"].combine_chunks())
    )
    column = block.schema.get_field_index("answer")
    return block.set_column(column, "answer", pc.coalesce(own, block["answer"])).cast(SET_SCHEMA)


def _with_answers(*blocks: pa.Table) -> pa.Table:
    """The rows that have an answer, numbered anew."""
    rows = pa.concat_tables(blocks)
    rows = rows.filter(pc.not_equal(rows["answer"], ""))
    column = rows.schema.get_field_index("row")
    return rows.set_column(column, "row", pa.array(range(rows.num_rows), pa.int64())).cast(
        SET_SCHEMA
    )


# "DEFAULT" keeps these tasks out of a Tune trial's placement group, whose resources belong to its workers.
_questions = ray.remote(scheduling_strategy="DEFAULT", num_returns=2)(_select_questions)
_fill = ray.remote(scheduling_strategy="DEFAULT")(_fill_in)
_answered = ray.remote(scheduling_strategy="DEFAULT")(_with_answers)
