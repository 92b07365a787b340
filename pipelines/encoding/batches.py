"""Which rows form a step, and which of them a worker holds.

Rows of like length form a batch; the order of batches is a function of the seed alone. Every worker holds its own share
of each batch, so that a step sees the same rows with any number of workers, and a resumed run goes on where it was.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import DataIterator, Dataset
from ray.train import DataConfig

from pipelines.cluster.tasks import this_node

if TYPE_CHECKING:
    from pipelines.encoding.labelled import ClassEncoder
    from pipelines.encoding.text import Encoder


class Stream(NamedTuple):
    """One kind of rows a step is made of: tokenised, in the order of batches, and the number of batches."""

    rows: Dataset
    batches: int


def plan_stream(
    rows: Dataset, encoder: "Encoder | ClassEncoder", batch_size: int, seed: int
) -> Stream:
    """Tokenise rows and cut them into batches.

    All of it happens before training: while the workers hold the CPUs, no other task could run. One task holds the
    stream's token ids, 4 bytes a token, and leaves them on the driver's node: they outlive the workers' nodes.
    """
    tokens = rows.map_batches(encoder.encode_batch, batch_format="numpy").materialize()
    arrange: Any = ray.remote(_arrange).options(num_returns=2, scheduling_strategy=this_node())
    batches, table = arrange.remote(batch_size, seed, encoder.mixes, *tokens.to_arrow_refs())
    return Stream(_in_order(ray.data.from_arrow_refs([table])), ray.get(batches))


def _arrange(batch_size: int, seed: int, mix: bool, *blocks: pa.Table) -> tuple[int, pa.Table]:
    """The number of batches, and the rows in the order of batches, with a column `batch`. To `mix` is to draw a
    batch's rows from the whole source, among rows of equal length: data sets are often sorted by class."""
    table = pa.concat_tables(blocks)
    draw = np.random.default_rng(seed)
    by_length = np.lexsort([table[key].to_numpy() for key in ("row", "set", "length")])
    if mix:
        by_length = draw.permutation(by_length)
        by_length = by_length[np.argsort(table["length"].to_numpy()[by_length], kind="stable")]
    batches = np.array_split(by_length, -(-len(by_length) // batch_size))
    chosen = [batches[source] for source in draw.permutation(len(batches))]
    numbers = np.repeat(np.arange(len(chosen)), [len(own) for own in chosen])
    return len(chosen), table.take(np.concatenate(chosen)).append_column(
        "batch", pa.array(numbers, pa.int64())
    )


def share_of(table: pa.Table, rank: int, world_size: int) -> pa.Table:
    """The rows whose place in their batch is `rank` modulo the number of workers."""
    batch_of_row = table["batch"].to_numpy()
    place = np.arange(len(batch_of_row)) - np.searchsorted(batch_of_row, batch_of_row)
    return table.filter(pa.array(place % world_size == rank))


def _in_order(dataset: Dataset) -> Dataset:
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    return dataset


class ShardByRank(DataConfig):
    """Cuts a stream into one share a worker, whenever a group of workers starts: its size may differ from the last.

    It runs in an actor of Ray Train on the driver's node, and starts no task: the workers may hold all CPUs.
    """

    def configure(
        self, datasets: dict[str, Dataset], world_size: int, *_args: Any, **_kwargs: Any
    ) -> list[dict[str, DataIterator]]:
        """One iterator a worker and stream."""
        blocks: dict[str, Any] = {name: rows.to_arrow_refs() for name, rows in datasets.items()}
        tables = {name: pa.concat_tables(ray.get(own)) for name, own in blocks.items()}
        return [
            {
                name: _in_order(
                    ray.data.from_blocks([share_of(table, rank, world_size)])
                ).iterator()
                for name, table in tables.items()
            }
            for rank in range(world_size)
        ]


def batches_of(
    share: DataIterator, number_of_batches: int, start: int = 0
) -> Iterator[list[dict[str, Any]]]:
    """A worker's rows of batch after batch, for ever; `start` batches are skipped. A batch may be empty."""
    first = start % number_of_batches
    while True:
        number = first
        for found, group in groupby(share.iter_rows(), key=lambda row: int(row["batch"])):
            if found < first:
                continue
            assert found >= number, "Ray Data has not kept the order of rows"
            for _ in range(number, found):
                yield []
            yield list(group)
            number = found + 1
        for _ in range(number, number_of_batches):
            yield []
        first = 0
