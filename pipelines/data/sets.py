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
    SourceConfig,
    Task,
)
from pipelines.config.schema import ConfigError
from pipelines.data.rows import (
    ANSWERED_BY_MODEL,
    IDS_IN_A_MESSAGE,
    Selection,
    Summary,
    number_rows,
    quoted,
    read_piece,
    summarise,
)
from pipelines.data.sources import Piece, find_pieces, request_ids

SETS_DISJOINT_FROM_FORGET = (
    "retain",
    "utility",
    "holdout",
)  # a row that must go cannot also stay, or count as never seen
DUPLICATE_KEY_TEXT = {  # what makes two rows the same, whatever their labels
    "causal_lm": "prompt and (where it has one) answer",
    "sequence_classification": "text",
    "image_classification": "image",
}


@dataclass(frozen=True)
class Sets:
    """The sets of a run. Every Dataset is materialised and has the columns of `pipelines.data.rows.SET_SCHEMA`:

    `set`, `row` (position after selection, 0 to n-1), `id`, `prompt` ('' for plain text), `answer` (the text, for plain
    text), `paraphrased_prompt`, `paraphrased_answer`, `fact` (a part of the answer), `perturbed_answers`, `label`,
    `image` (a file's bytes). What a source lacks is '', [] or b''; an answer is '' in the utility set alone, and beside
    an image. Blocks are in row order, and what is mapped from a Dataset here keeps that order and shows no progress
    bar: these two settings lie in the Dataset's own context, the process-wide DataContext is left alone.
    """

    forget: Dataset
    retain: Dataset
    utility: Dataset | None
    holdout: Dataset | None
    general: Dataset | None
    counts: dict[str, int]  # rows of each present set
    digests: dict[
        str, str
    ]  # 64 hexadecimal digits a set; equal rows give it, in any order, blocks and format
    unanswered: int  # rows of the utility set without an answer

    def names(self) -> list[str]:
        """The sets that are present, forget first."""
        return [name for name in SET_NAMES if getattr(self, name) is not None]

    def items(self) -> list[tuple[str, Dataset]]:
        """The sets that are present, with their names, forget first."""
        return [(name, getattr(self, name)) for name in self.names()]

    def inputs(self) -> dict[str, dict[str, int | str]]:
        """Each set's number of rows and digest, for the manifest."""
        return {
            name: {"rows": self.counts[name], "digest": self.digests[name]} for name in self.names()
        }

    def union(self, names: Sequence[str], *, present_only: bool = False) -> Dataset:
        """The rows of several sets as one Dataset.

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


@dataclass
class _Read:
    """What the driver knows of one set: where its blocks are, and their small columns."""

    blocks: list[Any]
    first_rows: list[int]
    rows: pa.Table
    digest: int

    @property
    def kept(self) -> pa.Table:
        return self.rows.filter(self.rows["kept"])


def load_sets(data: DataConfig, task: Task = "causal_lm") -> Sets:
    """Read, select, validate and materialise the sets of a configuration.

    Rows to classify are a text (`answer`) or an image, and a label each.

    Local paths and hub names are read on the driver's node, s3:// and gs:// anywhere. Where there is no id column, a
    row's id is its number in the source, counted from 0 (behind 'file:' where the source is several files).

    Raises:
        ConfigError: a source, a deletion request or a row is not as it must be; one line without any row's content.
        RuntimeError: Ray itself failed (lost workers, memory); one line.
    """
    sources: dict[str, SourceConfig] = {
        name: source for name in SET_NAMES if (source := getattr(data, name)) is not None
    }
    requests = {name: _requests(name, source) for name, source in sources.items()}
    pieces = [piece for name, source in sources.items() for piece in find_pieces(name, source)]
    with _without_ray_data_logs():
        try:
            selections = {
                name: _selection(source, requests[name], data.share_seed)
                for name, source in sources.items()
            }
            blocks = _read_blocks(pieces, data.columns, selections, task)
            summaries = _all_results([_summarise.remote(block) for block in blocks])
            read = {name: _gather(name, blocks, summaries) for name in sources}
            for name, source in sources.items():
                _check_set(name, source, requests[name], read[name])
            _check_apart(sources, read, DUPLICATE_KEY_TEXT[task])
            sizes = {name: _size(source, read[name]) for name, source in sources.items()}
            numbered = {name: _numbered(found, sizes[name]) for name, found in read.items()}
            datasets = {
                name: dataset_of([block for block, _ in tasks]) for name, tasks in numbered.items()
            }
            unanswered = sum(
                _all_results([number for _, number in numbered.get(ANSWERED_BY_MODEL, [])])
            )
        except RayTaskError as error:  # its own text quotes whatever the task was at
            raise RuntimeError(
                f"data: a Ray task failed while reading ({type(error.cause).__name__})"
            ) from None
        except RayError as error:
            raise RuntimeError(
                f"data: Ray failed while reading ({type(error).__name__}); see Ray's logs"
            ) from None
    return Sets(
        **{name: datasets.get(name) for name in SET_NAMES},  # pyright: ignore[reportArgumentType]
        counts=sizes,
        digests={name: f"{found.digest % 2**256:064x}" for name, found in read.items()},
        unanswered=unanswered,
    )


def _requests(name: str, source: SourceConfig) -> dict[str, list[str]]:
    """The ids of a source's deletion requests, by key."""
    paths = {"ids": source.ids, "exclude_ids": source.exclude_ids}
    return {
        key: request_ids(path, f"data.{name}.{key}")
        for key, path in paths.items()
        if path is not None
    }


def _selection(source: SourceConfig, requests: dict[str, list[str]], share_seed: int) -> Selection:
    return Selection(
        ids=frozenset(requests["ids"]) if "ids" in requests else None,
        exclude_ids=frozenset(requests.get("exclude_ids", [])),
        column=source.column,
        values=frozenset(str(value) for value in source.values),
        share=source.share,
        share_seed=share_seed,
    )


def _read_blocks(
    pieces: list[Piece], columns: ColumnsConfig, selections: dict[str, Selection], task: Task
) -> list[Any]:
    """References to blocks of READ_SCHEMA, those of one set in the order of its pieces."""
    readings = []
    for is_local in (True, False):
        chosen = [piece for piece in pieces if piece.is_local == is_local]
        if chosen:
            items = [{"piece": index} for index in range(len(chosen))]
            indices = ray.data.from_items(items, override_num_blocks=len(items))
            _set_quiet_and_ordered(indices)
            read = partial(
                _read_batch, pieces=chosen, columns=columns, selections=selections, task=task
            )
            readings.append(
                indices.map_batches(
                    read, batch_size=1, **(_on_this_node(len(items)) if is_local else {})
                )
            )
    reading = readings[0].union(*readings[1:]) if len(readings) > 1 else readings[0]
    return reading.materialize().to_arrow_refs()


def _on_this_node(num_tasks: int) -> dict[str, Any]:
    """Task options for the node whose files the driver sees, even where a cluster gives its head node no CPUs."""
    node = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    return {
        "label_selector": node,
        "num_cpus": 0,
        "concurrency": min(num_tasks, os.cpu_count() or 1),
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
    """Every task's result. All are fetched even when one failed: Ray logs failures nobody fetched, with their text."""
    results, failures = [], []
    for task in tasks:
        try:
            results.append(ray.get(task))
        except RayError as error:
            failures.append(error)
    if failures:
        raise failures[0]
    return results


def _gather(name: str, blocks: list[Any], summaries: list[Summary]) -> _Read:
    """What belongs to one set. Positions follow from the blocks' order and counts."""
    mine = [
        (block, summary)
        for block, summary in zip(blocks, summaries, strict=True)
        if summary.set == name
    ]
    read = _Read(
        [], [], pa.concat_tables([s.rows for _, s in mine] or [summaries[0].rows.slice(0, 0)]), 0
    )
    first_row = 0
    for block, summary in mine:
        num_kept = pc.sum(summary.rows["kept"]).as_py() or 0
        if num_kept:
            read.blocks.append(block)
            read.first_rows.append(first_row)
        first_row += num_kept
        read.digest += summary.digest
    return read


def _check_set(
    name: str, source: SourceConfig, requests: dict[str, list[str]], read: _Read
) -> None:
    """Refuse a set with a fault, without rows, with ids twice, or whose selectors name what is not there."""
    faults = read.rows.filter(pc.not_equal(read.rows["fault"], ""))["fault"]
    if len(faults):
        raise ConfigError(faults[0].as_py())
    for key, ids in requests.items():
        path = getattr(source, key)
        wanted = pa.array(ids, pa.string())
        missing = wanted.filter(
            pc.invert(pc.is_in(wanted, value_set=read.rows["id"].combine_chunks()))
        )
        if len(missing):
            raise ConfigError(
                f"data.{name}.{key}: {path} names {_number(len(missing), 'id')} that {source.path} does not have: "
                f"{quoted(missing[:IDS_IN_A_MESSAGE].to_pylist())}; allowed: ids of its rows"
            )
    values_found = set(pc.unique(read.rows["value"]).to_pylist())
    missing_values = [str(value) for value in source.values if str(value) not in values_found]
    if missing_values:
        raise ConfigError(
            f"data.{name}.values: {source.path} has no row whose '{source.column}' is {quoted(missing_values)}; "
            "allowed: values of that column"
        )
    kept = read.kept
    if not kept.num_rows:
        selects = requests or source.column is not None or source.share is not None
        left = (
            "no row is left after ids, exclude_ids, column and share" if selects else "has no rows"
        )
        raise ConfigError(f"data.{name}.path: {source.path}: {left}; allowed: at least one row")
    counts = pc.value_counts(kept["id"])
    repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        raise ConfigError(
            f"data.{name}.path: {source.path} has {_number(len(repeated), 'id')} more than once: "
            f"{quoted(repeated[:IDS_IN_A_MESSAGE].to_pylist())}; allowed: a row an id"
        )


def _check_apart(sources: dict[str, SourceConfig], read: dict[str, _Read], by: str) -> None:
    """Refuse forget rows whose prompt and answer (to classify: text or image) also stand in a set that must stay or was
    never learned, or whose prompt stands in it alone: the model's own answer would be the one to forget."""
    forget = read["forget"].kept
    for name in SETS_DISJOINT_FROM_FORGET:
        if name not in sources:
            continue
        other = read[name].kept
        alone = other.filter(
            pc.equal(other["content"], other["question"])
        )  # prompts without an answer
        same_row = pc.is_in(forget["content"], value_set=other["content"].combine_chunks())
        same_prompt = pc.is_in(forget["question"], value_set=alone["question"].combine_chunks())
        shared = forget.filter(pc.or_(same_row, same_prompt))
        if shared.num_rows:
            raise ConfigError(
                f"data.forget.path: {sources['forget'].path} shares {_number(shared.num_rows, 'row')} with {name} "
                f"({sources[name].path}), by {by}: ids "
                f"{quoted(shared['id'][:IDS_IN_A_MESSAGE].to_pylist())}; allowed: forget rows that {name} does not have"
            )


def _size(source: SourceConfig, read: _Read) -> int:
    """Rows that are left after `max_rows`."""
    found = read.kept.num_rows
    return found if source.max_rows is None else min(found, source.max_rows)


def _numbered(read: _Read, size: int) -> list[Any]:
    """For each block a reference to its rows as the set has them, and one to its number of rows without an answer."""
    found = read.kept.num_rows
    return [
        _number_rows.remote(block, first, found, size)
        for block, first in zip(read.blocks, read.first_rows, strict=True)
    ]


def dataset_of(blocks: list[Any]) -> Dataset:
    """Referenced blocks of SET_SCHEMA as one of the Datasets of `Sets`."""
    dataset = ray.data.from_arrow_refs(blocks)
    _set_quiet_and_ordered(dataset)
    return dataset


def _set_quiet_and_ordered(dataset: Dataset) -> None:
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False


@contextmanager
def _without_ray_data_logs() -> Generator[None]:
    """Ray Data announces each execution on the console; the caller has its own progress and errors."""
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
