"""The sets of an unlearning problem: from sources and selectors to validated Ray Datasets.

One Ray Data execution reads all sets, with a task per file, since every execution costs a second
and the sets are often small. Plain Ray tasks then check each block's ids and hashes, and number the
rows. Neither rows nor anything that every row has leaves the object store.
"""

import logging
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import Dataset
from ray.exceptions import RayError, RayTaskError

from pipelines.cluster.tasks import all_results
from pipelines.config.data import (
    SET_NAMES,
    ColumnsConfig,
    DataConfig,
    SetName,
    SourceConfig,
    Task,
)
from pipelines.config.schema import ConfigError
from pipelines.data.columns import ANSWERED_BY_MODEL
from pipelines.data.keys import summarise
from pipelines.data.rows import number_rows, read_piece
from pipelines.data.set_reader import SetReader

# A row to forget can neither be retained nor count as never learned, whichever request it is of.
DISJOINT: dict[SetName, tuple[SetName, ...]] = {
    "forget": ("retain", "utility", "holdout", "neighbours", "earlier"),
    "earlier": ("retain", "utility", "holdout"),
}
DUPLICATE_KEY_TEXT = {  # what must be equal in two rows for them to be one, whatever their labels
    "causal_lm": "prompt and (where it has one) answer",
    "sequence_classification": "text",
    "image_classification": "image",
}


@dataclass(frozen=True)
class Sets:
    """The sets of a run.

    Every Dataset is materialised and has the columns of `pipelines.data.rows.SetRow`. An answer
    is '' only in the utility set and beside an image. Blocks are in row order. A Dataset that is
    mapped from one of these keeps the order and shows no progress bar, because both settings lie
    in the Dataset's own context. The process-wide DataContext belongs to the caller.
    """

    forget: Dataset
    retain: Dataset
    utility: Dataset | None
    holdout: Dataset | None
    general: Dataset | None
    neighbours: Dataset | None
    earlier: Dataset | None
    counts: dict[str, int]  # rows by set
    digests: dict[str, str]  # 64 hexadecimal digits by set, which depend on its rows alone
    unanswered: int  # rows of the utility set without an answer
    forget_ids: list[str]  # of the forget set's rows, in their order

    def names(self) -> list[str]:
        """Return the names of the sets that are present, forget first."""
        return [name for name in SET_NAMES if getattr(self, name) is not None]

    def items(self) -> list[tuple[str, Dataset]]:
        """Return the sets that are present, with their names, forget first."""
        return [(name, getattr(self, name)) for name in self.names()]

    def inputs(self) -> dict[str, dict[str, int | str]]:
        """Return each set's number of rows and digest, for the manifest."""
        inputs: dict[str, dict[str, int | str]] = {}
        for name in self.names():
            inputs[name] = {"rows": self.counts[name], "digest": self.digests[name]}
        return inputs

    def union(self, names: Sequence[str], *, present_only: bool = False) -> Dataset:
        """Return the rows of several sets as one Dataset.

        Raises:
            ConfigError: a set is absent. With `present_only` it is skipped.
        """
        missing = [name for name in names if name not in self.names()]
        if missing and not present_only:
            raise ConfigError(
                f"finetune.sets: found {missing[0]}, which data does not give, "
                f"allowed: {', '.join(self.names())}"
            )
        return joined([getattr(self, name) for name in names if name not in missing])


def load_sets(data: DataConfig, task: Task = "causal_lm") -> Sets:
    """Read, select, validate and materialise the sets of a configuration.

    A row to classify is a text (`answer`) or an image, with a label. Local paths and hub names are
    read on the driver's node, s3:// and gs:// on any. Without an id column, a row's id is its
    number in the source, counted from 0 (behind 'file:' where the source is several files).

    Raises:
        ConfigError: a source, a deletion request or a row is faulty. One line that quotes no row.
        RuntimeError: Ray itself failed (lost workers, memory). One line.
    """
    readers: dict[str, SetReader] = {}
    for name in SET_NAMES:
        source: SourceConfig | None = getattr(data, name)
        if source is not None:
            readers[name] = SetReader(name, source, data.share_seed)
    datasets: dict[str, Dataset] = {}
    unanswered = 0
    with _quiet_ray():
        blocks = _read_blocks(list(readers.values()), data.columns, task)
        requests: Any = ray.put({name: reader.requested for name, reader in readers.items()})
        tasks: list[Any] = [_summarise.remote(block, requests) for block in blocks]
        # A failed task's keys fail, too, and nobody fetches these.
        summaries = all_results([summary for summary, _ in tasks], [keys for _, keys in tasks])
        for reader in readers.values():
            for block, summary, (_, keys) in zip(blocks, summaries, tasks, strict=True):
                reader.add_block(block, summary, keys)
            reader.check()
        for name, others in DISJOINT.items():
            for other in others:
                if name in readers and other in readers:
                    readers[name].check_disjoint(readers[other], DUPLICATE_KEY_TEXT[task])
        for name, reader in readers.items():
            datasets[name], num_unanswered = _number(reader)
            if name == ANSWERED_BY_MODEL:
                unanswered = sum(all_results(num_unanswered))
        forget_ids = readers["forget"].ids()
    return Sets(
        **{name: datasets.get(name) for name in SET_NAMES},  # pyright: ignore[reportArgumentType]
        counts={name: reader.size for name, reader in readers.items()},
        digests={name: f"{reader.digest % 2**256:064x}" for name, reader in readers.items()},
        unanswered=unanswered,
        forget_ids=forget_ids,
    )


@contextmanager
def _quiet_ray() -> Generator[None]:
    """Silence Ray Data's log, and raise Ray's exceptions as a RuntimeError of one line.

    Ray Data announces each execution on the console, where the caller shows its own progress. The
    message of a failed task quotes its arguments, which may be rows.
    """
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    except RayTaskError as error:
        cause = type(error.cause).__name__
        raise RuntimeError(f"data: a Ray task failed while reading ({cause})") from None
    except RayError as error:
        fault = type(error).__name__
        raise RuntimeError(f"data: Ray failed while reading ({fault}); see Ray's logs") from None
    finally:
        logger.setLevel(level)


def _read_blocks(readers: list[SetReader], columns: ColumnsConfig, task: Task) -> list[Any]:
    """Return references to blocks of READ_SCHEMA. Those of one set have the order of its pieces."""
    selections = {reader.name: reader.selection for reader in readers}
    pieces = [piece for reader in readers for piece in reader.pieces]

    def read(batch: Any) -> Iterator[pa.Table]:
        for index in batch["piece"]:
            piece = pieces[index]
            yield from read_piece(piece, columns, selections[piece.set], task)

    local = [index for index, piece in enumerate(pieces) if piece.is_local]
    remote = [index for index, piece in enumerate(pieces) if not piece.is_local]
    # Local files must be read on the node where the driver sees them. A cluster may offer no CPUs
    # there (a head node often has none), so these tasks ask for none and are limited by number.
    on_this_node = {
        "label_selector": {"ray.io/node-id": ray.get_runtime_context().get_node_id()},
        "num_cpus": 0,
        "concurrency": max(1, min(len(local), os.cpu_count() or 1)),
    }
    readings: list[Dataset] = []
    for group, options in ((local, on_this_node), (remote, {})):
        if group:
            items = [{"piece": index} for index in group]
            indices = ray.data.from_items(items, override_num_blocks=len(items))
            _set_quiet_and_ordered(indices)
            readings.append(indices.map_batches(read, batch_size=1, **options))
    return joined(readings).materialize().to_arrow_refs()


def joined(datasets: list[Dataset]) -> Dataset:
    """Return the rows of some Datasets as one, in their order."""
    first, *rest = datasets
    return first.union(*rest) if rest else first


def as_retained(rows: Dataset, first_row: int) -> Dataset:
    """Return rows of any set as rows of the retain set, so that they are encoded as those are.

    They are numbered from `first_row` on, the retain set's number of rows.
    """
    return rows.map_batches(partial(_in_retain_set, first_row=first_row), batch_format="pyarrow")


def _in_retain_set(rows: pa.Table, first_row: int) -> pa.Table:
    names = pa.array(["retain"] * rows.num_rows, pa.string())
    numbers = pa.array(rows["row"].to_numpy() + first_row, pa.int64())
    rows = rows.set_column(rows.schema.get_field_index("set"), "set", names)
    return rows.set_column(rows.schema.get_field_index("row"), "row", numbers)


def _number(reader: SetReader) -> tuple[Dataset, list[Any]]:
    """Start to number the rows of a set.

    Returns:
        Their Dataset, and for each block a reference to its number of rows without an answer.
    """
    rows: list[Any] = []
    num_unanswered: list[Any] = []
    for block, first_row in zip(reader.blocks, reader.first_rows, strict=True):
        results: Any = _number_rows.remote(block, first_row, reader.selected, reader.size)
        rows.append(results[0])
        num_unanswered.append(results[1])
    return dataset_of(rows), num_unanswered


# "DEFAULT" keeps these tasks out of a Tune trial's placement group, whose resources belong to its
# workers. A task there would wait for resources that they hold.
_summarise = ray.remote(scheduling_strategy="DEFAULT", num_returns=2)(summarise)
_number_rows = ray.remote(scheduling_strategy="DEFAULT", num_returns=2)(number_rows)


def dataset_of(blocks: list[Any]) -> Dataset:
    """Return referenced blocks of SET_SCHEMA as a Dataset like those of `Sets`."""
    dataset = ray.data.from_arrow_refs(blocks)
    _set_quiet_and_ordered(dataset)
    return dataset


def _set_quiet_and_ordered(dataset: Dataset) -> None:
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
