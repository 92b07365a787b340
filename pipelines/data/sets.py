"""The sets of an unlearning problem: from sources and selectors to validated Ray Datasets of one schema.

All sets are read in one Ray Data execution (a task a file), since an execution costs a second and the sets are often
small. Then plain tasks reduce each block to its ids and hashes, which is all the driver sees and checks, and number
the rows. The blocks stay in the object store.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions when it is imported)

import logging
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from ray.data import Dataset
from ray.exceptions import RayError, RayTaskError

from pipelines.config.data import (
    SET_NAMES,
    ColumnsConfig,
    DataConfig,
    SetName,
    SourceConfig,
    Task,
)
from pipelines.config.schema import ConfigError
from pipelines.data.readers import Piece
from pipelines.data.rows import (
    ANSWERED_BY_MODEL,
    Selection,
    Summary,
    number_rows,
    quoted,
    read_piece,
    summarise,
)
from pipelines.data.sources import find_pieces, request_ids

# A row that must go cannot also stay, or count as never seen.
SETS_DISJOINT_FROM_FORGET: tuple[SetName, ...] = ("retain", "utility", "holdout")
DUPLICATE_KEY_TEXT = {  # what makes two rows the same, whatever their labels
    "causal_lm": "prompt and (where it has one) answer",
    "sequence_classification": "text",
    "image_classification": "image",
}


@dataclass(frozen=True)
class Sets:
    """The sets of a run. Every Dataset is materialised and has the columns of `pipelines.data.rows.SetRow`.

    An answer is '' in the utility set alone, and beside an image. Blocks are in row order, and what is mapped from a
    Dataset here keeps that order and shows no progress bar: these two settings lie in the Dataset's own context, the
    process-wide DataContext is left alone.
    """

    forget: Dataset
    retain: Dataset
    utility: Dataset | None
    holdout: Dataset | None
    general: Dataset | None
    counts: dict[str, int]  # rows of each present set
    # 64 hexadecimal digits a set; equal rows give it, in any order, blocks and format
    digests: dict[str, str]
    unanswered: int  # rows of the utility set without an answer

    def names(self) -> list[str]:
        """Return the names of the sets that are present, forget first."""
        return [name for name in SET_NAMES if getattr(self, name) is not None]

    def items(self) -> list[tuple[str, Dataset]]:
        """Return the sets that are present, with their names, forget first."""
        return [(name, getattr(self, name)) for name in self.names()]

    def inputs(self) -> dict[str, dict[str, int | str]]:
        """Return each set's number of rows and digest, for the manifest."""
        return {
            name: {"rows": self.counts[name], "digest": self.digests[name]} for name in self.names()
        }

    def union(self, names: Sequence[str], *, present_only: bool = False) -> Dataset:
        """Return the rows of several sets as one Dataset.

        Raises:
            ConfigError: a set is not there (with `present_only` it is passed over).
        """
        missing = [name for name in names if name not in self.names()]
        if missing and not present_only:
            raise ConfigError(
                f"finetune.sets: found {missing[0]}, which data does not give, allowed: {', '.join(self.names())}"
            )
        first, *rest = [getattr(self, name) for name in names if name not in missing]
        return first.union(*rest) if rest else first


class SetReader:
    """One set on its way from its source to a Dataset, and what the driver knows of it.

    Raises:
        ConfigError: its source or a deletion request cannot be found.
    """

    def __init__(self, name: SetName, source: SourceConfig, share_seed: int) -> None:
        self.name = name
        self.source = source
        self.requests: dict[str, list[str]] = {}
        for key, path in (("ids", source.ids), ("exclude_ids", source.exclude_ids)):
            if path is not None:
                self.requests[key] = request_ids(path, f"data.{name}.{key}")
        self.pieces = find_pieces(name, source)
        self.selection = Selection(
            ids=frozenset(self.requests["ids"]) if source.ids else None,
            exclude_ids=frozenset(self.requests.get("exclude_ids", ())),
            column=source.column,
            values=frozenset(map(str, source.values)),
            share=source.share,
            share_seed=share_seed,
        )
        self.blocks: list[Any] = []  # references to its blocks that hold kept rows
        self.first_rows: list[int] = []  # the position in the set of each block's first kept row
        self.rows: pa.Table = pa.table({})  # the small columns of all that was read
        self.kept: pa.Table = pa.table({})  # of the rows that are kept
        self.digest = 0

    @property
    def size(self) -> int:
        """Rows that are left after `max_rows`."""
        return min(self.kept.num_rows, self.source.max_rows or self.kept.num_rows)

    def take(self, blocks: list[Any], summaries: list[Summary]) -> None:
        """Take what belongs to this set. Positions follow from the blocks' order and counts."""
        tables = [summaries[0].rows.slice(0, 0)]
        first_row = 0
        for block, summary in zip(blocks, summaries, strict=True):
            if summary.set != self.name:
                continue
            tables.append(summary.rows)
            self.digest += summary.digest
            num_kept = pc.sum(summary.rows["kept"]).as_py() or 0
            if num_kept:
                self.blocks.append(block)
                self.first_rows.append(first_row)
            first_row += num_kept
        self.rows = pa.concat_tables(tables)
        self.kept = self.rows.filter(self.rows["kept"])

    def check(self) -> None:
        """Refuse a set with a fault, without rows, with ids twice, or whose selectors name what is not there."""
        self._check_faults()
        where, path = f"data.{self.name}", self.source.path
        for key, ids in self.requests.items():
            wanted = pa.array(ids, pa.string())
            is_there = pc.is_in(wanted, value_set=self.rows["id"].combine_chunks())
            missing = wanted.filter(pc.invert(is_there)).to_pylist()
            if missing:
                raise ConfigError(
                    f"{where}.{key}: {getattr(self.source, key)} names {_number(len(missing), 'id')} that {path} "
                    f"does not have: {quoted(missing)}; allowed: ids of its rows"
                )
        values_found = set(pc.unique(self.rows["value"]).to_pylist())
        missing_values = [text for text in map(str, self.source.values) if text not in values_found]
        if missing_values:
            raise ConfigError(
                f"{where}.values: {path} has no row whose '{self.source.column}' is {quoted(missing_values)}; "
                "allowed: values of that column"
            )
        if not self.kept.num_rows:
            left = "has no rows"
            if self.requests or self.source.column is not None or self.source.share is not None:
                left = "no row is left after ids, exclude_ids, column and share"
            raise ConfigError(f"{where}.path: {path}: {left}; allowed: at least one row")
        counts = pc.value_counts(self.kept["id"])
        is_repeated = pc.greater(counts.field("counts"), 1)
        repeated = counts.field("values").filter(is_repeated).to_pylist()
        if repeated:
            raise ConfigError(
                f"{where}.path: {path} has {_number(len(repeated), 'id')} more than once: {quoted(repeated)}; "
                "allowed: a row an id"
            )

    def _check_faults(self) -> None:
        faults = self.rows.filter(pc.not_equal(self.rows["fault"], "")).select(["fault", "trace"])
        if faults.num_rows:
            first = faults.slice(0, 1).to_pylist()[0]
            error = ConfigError(first["fault"])
            if first["trace"]:  # what `--debug` shows of a reader that failed on a worker
                error.add_note(f"On the worker, without messages:\n{first['trace']}")
            raise error

    def number(self) -> tuple[Dataset, list[Any]]:
        """Start to number the kept rows; return their Dataset, and a reference to each block's count of rows without an
        answer."""
        rows, unanswered = [], []
        for block, first_row in zip(self.blocks, self.first_rows, strict=True):
            tasks: Any = _number_rows.remote(block, first_row, self.kept.num_rows, self.size)
            rows.append(tasks[0])
            unanswered.append(tasks[1])
        return dataset_of(rows), unanswered


def load_sets(data: DataConfig, task: Task = "causal_lm") -> Sets:
    """Read, select, validate and materialise the sets of a configuration.

    Rows to classify are a text (`answer`) or an image, and a label each.

    Local paths and hub names are read on the driver's node, s3:// and gs:// anywhere. Where there is no id column, a
    row's id is its number in the source, counted from 0 (behind 'file:' where the source is several files).

    Raises:
        ConfigError: a source, a deletion request or a row is not as it must be; one line without any row's content.
        RuntimeError: Ray itself failed (lost workers, memory); one line.
    """
    readers: dict[str, SetReader] = {}
    for name in SET_NAMES:
        source: SourceConfig | None = getattr(data, name)
        if source is not None:
            readers[name] = SetReader(name, source, data.share_seed)
    datasets: dict[str, Dataset] = {}
    unanswered = 0
    with _without_ray_data_logs(), _failures_in_one_line():
        blocks = _read_blocks(list(readers.values()), data.columns, task)
        summaries = _all_results([_summarise.remote(block) for block in blocks])
        for reader in readers.values():
            reader.take(blocks, summaries)
            reader.check()
        for name in SETS_DISJOINT_FROM_FORGET:
            if name in readers:
                _check_disjoint(readers["forget"], readers[name], DUPLICATE_KEY_TEXT[task])
        for name, reader in readers.items():
            datasets[name], counts = reader.number()
            if name == ANSWERED_BY_MODEL:
                unanswered = sum(_all_results(counts))
    return Sets(
        **{name: datasets.get(name) for name in SET_NAMES},  # pyright: ignore[reportArgumentType]
        counts={name: reader.size for name, reader in readers.items()},
        digests={name: f"{reader.digest % 2**256:064x}" for name, reader in readers.items()},
        unanswered=unanswered,
    )


@contextmanager
def _failures_in_one_line() -> Generator[None]:
    """Turn Ray's exceptions into a RuntimeError: a task's own text quotes whatever the task was at."""
    try:
        yield
    except RayTaskError as error:
        raise RuntimeError(
            f"data: a Ray task failed while reading ({type(error.cause).__name__})"
        ) from None
    except RayError as error:
        raise RuntimeError(
            f"data: Ray failed while reading ({type(error).__name__}); see Ray's logs"
        ) from None


def _read_blocks(readers: list[SetReader], columns: ColumnsConfig, task: Task) -> list[Any]:
    """Return references to blocks of READ_SCHEMA, those of one set in the order of its pieces."""
    selections = {reader.name: reader.selection for reader in readers}
    pieces = [piece for reader in readers for piece in reader.pieces]
    local = [piece for piece in pieces if piece.is_local]
    remote = [piece for piece in pieces if not piece.is_local]
    readings: list[Dataset] = []
    for group, options in ((local, _on_this_node(len(local))), (remote, {})):
        if group:
            items = [{"piece": index} for index in range(len(group))]
            indices = ray.data.from_items(items, override_num_blocks=len(items))
            _set_quiet_and_ordered(indices)
            read = partial(
                _read_batch, pieces=group, columns=columns, selections=selections, task=task
            )
            readings.append(indices.map_batches(read, batch_size=1, **options))
    first, *rest = readings
    reading = first.union(*rest) if rest else first
    return reading.materialize().to_arrow_refs()


def _on_this_node(num_tasks: int) -> dict[str, Any]:
    """Return task options for the node whose files the driver sees, even where a cluster gives that node no CPUs."""
    return {
        "label_selector": {"ray.io/node-id": ray.get_runtime_context().get_node_id()},
        "num_cpus": 0,
        "concurrency": max(1, min(num_tasks, os.cpu_count() or 1)),
    }


def _read_batch(
    batch: Any,
    pieces: list[Piece],
    columns: ColumnsConfig,
    selections: dict[str, Selection],
    task: Task,
) -> Iterator[pa.Table]:
    for index in batch["piece"]:
        piece = pieces[index]
        yield from read_piece(piece, columns, selections[piece.set], task)


# "DEFAULT" keeps these tasks out of a Tune trial's placement group, whose resources belong to its workers.
_summarise = ray.remote(scheduling_strategy="DEFAULT")(summarise)
_number_rows = ray.remote(scheduling_strategy="DEFAULT", num_returns=2)(number_rows)


def _all_results(tasks: list[Any]) -> list[Any]:
    """Return every task's result.

    Every task is awaited even after a failure, because Ray logs the message of an unfetched failure, and it may quote a
    row.
    """
    results: list[Any] = []
    failures: list[RayError] = []
    for task in tasks:
        try:
            results.append(ray.get(task))
        except RayError as error:
            failures.append(error)
    if failures:
        raise failures[0]
    return results


def _check_disjoint(forget: SetReader, other: SetReader, key_text: str) -> None:
    """Refuse forget rows whose prompt and answer (to classify: text or image) also stand in a set that must stay or was
    never learned, or whose prompt stands in it alone: the model's own answer would be the one to forget."""
    rows, others = forget.kept, other.kept
    has_no_answer = pc.equal(others["content"], others["question"])
    prompts = others["question"].filter(has_no_answer)
    same_row = pc.is_in(rows["content"], value_set=others["content"].combine_chunks())
    same_prompt = pc.is_in(rows["question"], value_set=prompts.combine_chunks())
    shared = rows["id"].filter(pc.or_(same_row, same_prompt)).to_pylist()
    if shared:
        raise ConfigError(
            f"data.forget.path: {forget.source.path} shares {_number(len(shared), 'row')} with {other.name} "
            f"({other.source.path}), by {key_text}: ids {quoted(shared)}; allowed: forget rows that {other.name} "
            "does not have"
        )


def dataset_of(blocks: list[Any]) -> Dataset:
    """Return referenced blocks of SET_SCHEMA as one of the Datasets of `Sets`."""
    dataset = ray.data.from_arrow_refs(blocks)
    _set_quiet_and_ordered(dataset)
    return dataset


def _set_quiet_and_ordered(dataset: Dataset) -> None:
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False


@contextmanager
def _without_ray_data_logs() -> Generator[None]:
    """Silence Ray Data, which announces each execution on the console; the caller has its own progress and errors."""
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
