"""Give utility prompts without an answer the model's own, greedy, from before unlearning.

What the model says by itself is what must not move, so its answer's tokens stand for that in the
statistics and in training. They are generated once and stay in the run's folder until it is
complete: a run that continues reads them.
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

from pipelines.cluster.tasks import on_this_node, result_of
from pipelines.config.schema import UnlearnConfig
from pipelines.data.rows import SET_SCHEMA
from pipelines.data.sets import Sets, dataset_of
from pipelines.evaluation.pool import scoring_pool
from pipelines.storage.atomic import replacing
from pipelines.terminal import Terminal

FILE_NAME = "utility_answers.parquet"
# In the file's metadata: a set's own digest does not depend on the order of its rows.
DIGEST = b"questions_sha256"


def with_own_answers(cfg: UnlearnConfig, sets: Sets, folder: Path, terminal: Terminal) -> Sets:
    """Return the sets with an answer in every utility row, the model's own where it had none.

    An answer has at most `evaluation.max_new_tokens` tokens, and none where the model ends at once.
    The answers lie in the folder's `utility_answers.parquet` (row, answer). They are generated
    where it is missing or belongs to other questions, by actors of the training's resources, which
    are gone when this returns.
    """
    if not sets.unanswered:
        return sets
    assert sets.utility is not None
    path = folder / FILE_NAME
    blocks = sets.utility.to_arrow_refs()
    questions = _questions.remote(*blocks)
    if not result_of(on_this_node(holds_answers).remote(path, questions)):
        bar = terminal.bar("Answering utility prompts", sets.unanswered)
        answers = _generate(cfg, questions, sets.unanswered, bar.advance)
        result_of(on_this_node(_write).remote(path, questions, *answers))
        bar.finish()
    answers = on_this_node(parquet.read_table).remote(path)
    filled = dataset_of([_filled.remote(block, answers) for block in blocks])
    return replace(sets, utility=filled, unanswered=0)


def drop_answers(folder: Path) -> None:
    """Remove the answers of a complete run: the model that gave them knew the forget set."""
    (folder / FILE_NAME).unlink(missing_ok=True)


def answered_only(sets: Sets) -> Sets:
    """Return the sets without the utility rows that have no answer, or without the utility set."""
    if not sets.unanswered:
        return sets
    assert sets.utility is not None
    counts = dict(sets.counts)
    counts["utility"] -= sets.unanswered
    if counts["utility"]:
        utility = dataset_of([_answered.remote(*sets.utility.to_arrow_refs())])
    else:
        utility = None
        del counts["utility"]
    return replace(sets, utility=utility, counts=counts, unanswered=0)


def _generate(
    cfg: UnlearnConfig, questions: Any, count: int, advance: Callable[[int], None]
) -> list[Any]:
    """Return references to tables of answers, in the questions' order; the driver sees no text."""
    limit = cfg.evaluation.batch_size
    answers: list[Any] = []

    def start(worker: Any, first: int) -> Any:
        answer_method = worker.answers.options(num_returns=2)
        table, rows_answered = answer_method.remote("before", questions, first, limit)
        answers.append(table)
        return rows_answered

    with scoring_pool(cfg, {"before": cfg.model}) as pool:
        for rows_answered in pool.map_unordered(start, range(0, count, limit)):
            advance(rows_answered)
    return answers


# "DEFAULT" leaves these tasks out of a Tune trial's placement group, whose CPUs its workers have.
@ray.remote(scheduling_strategy="DEFAULT")
def _questions(*blocks: pa.Table) -> pa.Table:
    """Return row number and prompt of each row without an answer."""
    rows = pa.concat_tables(blocks)
    return rows.filter(pc.equal(rows["answer"], "")).select(["row", "prompt"])


@ray.remote(scheduling_strategy="DEFAULT")
def _filled(block: pa.Table, answers: pa.Table) -> pa.Table:
    """Return a block with these answers in the rows that they name."""
    # A row that has an answer is not among them: its index is null, and so is what it takes.
    index = pc.index_in(block["row"], value_set=answers["row"].combine_chunks())
    filled = pc.coalesce(answers["answer"].take(index), block["answer"])
    return _with_column(block, "answer", filled)


@ray.remote(scheduling_strategy="DEFAULT")
def _answered(*blocks: pa.Table) -> pa.Table:
    """Return the rows that have an answer, numbered anew."""
    rows = pa.concat_tables(blocks)
    rows = rows.filter(pc.not_equal(rows["answer"], ""))
    # Sets are thinned by the row's number (`pool.pieces_of`), which must run without gaps.
    return _with_column(rows, "row", pa.array(range(rows.num_rows), pa.int64()))


def _with_column(rows: pa.Table, name: str, values: Any) -> pa.Table:
    return rows.set_column(rows.schema.get_field_index(name), name, values).cast(SET_SCHEMA)


def holds_answers(path: Path, questions: pa.Table) -> bool:
    """Return whether a file holds the answers to these questions."""
    if not path.exists():
        return False
    metadata = parquet.read_schema(path).metadata or {}
    return metadata.get(DIGEST) == _digest(questions)


def _write(path: Path, questions: pa.Table, *tables: pa.Table) -> None:
    """Write the answers to the questions, all at once or not at all."""
    answers = pa.concat_tables(tables)
    assert answers["row"].equals(questions["row"]), "each question has one answer"
    with replacing(path) as partial:
        parquet.write_table(answers.replace_schema_metadata({DIGEST: _digest(questions)}), partial)


def _digest(questions: pa.Table) -> bytes:
    text = json.dumps(questions.to_pydict())
    return hashlib.sha256(text.encode()).hexdigest().encode()
