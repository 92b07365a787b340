"""The rows of each step, and the share of them that each worker holds.

Rows of similar length form a batch, because a batch is padded to its longest row. The order of
batches is a function of the seed alone. Every worker holds its own share of each batch, so that a
step sees the same rows with any number of workers, and a resumed run continues where it was.
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
    from pipelines.encoding.encoder import Encoder


class Stream(NamedTuple):
    """Tokenised rows of one kind in the order of their batches, and the number of batches."""

    rows: Dataset
    batches: int


def plan_stream(rows: Dataset, encoder: "Encoder", batch_size: int, seed: int) -> Stream:
    """Tokenise rows and cut them into batches.

    All of it happens before training: while the workers hold the CPUs, no other task could run.
    One task holds the stream's token ids, 4 bytes a token, and leaves them on the driver's node,
    where they outlive the workers' nodes.
    """
    tokens = rows.map_batches(encoder.encode_batch, batch_format="numpy").materialize()
    arrange: Any = ray.remote(_arrange).options(num_returns=2, scheduling_strategy=this_node())
    batches, table = arrange.remote(batch_size, seed, encoder.mixes, *tokens.to_arrow_refs())
    return Stream(_in_order(ray.data.from_arrow_refs([table])), ray.get(batches))


def _arrange(batch_size: int, seed: int, mixes: bool, *blocks: pa.Table) -> tuple[int, pa.Table]:
    """Return the number of batches, and the rows in their order with a column `batch`.

    With `mixes` a batch's rows come from the whole source, among rows of equal length.
    """
    table = pa.concat_tables(blocks)
    ids = table.schema.get_field_index("input_ids")
    small = table["input_ids"].cast(pa.list_(pa.int32()))  # half the memory
    table = table.set_column(ids, "input_ids", small)
    draw = np.random.default_rng(seed)
    length = table["length"].to_numpy()
    # Length decides first, then set and row, so that the order does not depend on the blocks.
    by_length = np.lexsort((table["row"].to_numpy(), table["set"].to_numpy(), length))
    if mixes:
        by_length = draw.permutation(by_length)
        by_length = by_length[np.argsort(length[by_length], kind="stable")]
    batches = np.array_split(by_length, -(-len(by_length) // batch_size))
    order = draw.permutation(len(batches))
    rows = np.concatenate([batches[index] for index in order])
    numbers = np.repeat(np.arange(len(order)), np.asarray([len(batch) for batch in batches])[order])
    return len(order), table.take(rows).append_column("batch", pa.array(numbers, pa.int64()))


def share_of(table: pa.Table, rank: int, world_size: int) -> pa.Table:
    """Return the rows whose position in their batch is `rank` modulo the number of workers."""
    batch_N = table["batch"].to_numpy()
    # The rows of a batch are adjacent, so a binary search finds the first of them.
    position_N = np.arange(len(batch_N)) - np.searchsorted(batch_N, batch_N)
    return table.filter(pa.array(position_N % world_size == rank))


def _in_order(dataset: Dataset) -> Dataset:
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    return dataset


class ShardByRank(DataConfig):
    """Cut a stream into one share per worker, whenever a group of workers starts.

    The size of the group may differ from the last. This runs in an actor of Ray Train on the
    driver's node, and starts no task: the workers may hold all CPUs.
    """

    def configure(
        self, datasets: dict[str, Dataset], world_size: int, *_args: Any, **_kwargs: Any
    ) -> list[dict[str, DataIterator]]:
        """Return one iterator per worker and stream."""
        shares: list[dict[str, DataIterator]] = [{} for _ in range(world_size)]
        for name, rows in datasets.items():
            blocks: Any = rows.to_arrow_refs()
            table = pa.concat_tables(ray.get(blocks))
            for rank, share in enumerate(shares):
                of_rank = ray.data.from_blocks([share_of(table, rank, world_size)])
                share[name] = _in_order(of_rank).iterator()
        return shares


def batches_of(
    share: DataIterator, number_of_batches: int, start: int = 0
) -> Iterator[list[dict[str, Any]]]:
    """Yield a worker's rows of batch after batch without end, from batch `start` on.

    A batch is empty where the worker has no share of it.
    """
    first = start % number_of_batches
    while True:
        expected = first
        for number, group in groupby(share.iter_rows(), key=lambda row: int(row["batch"])):
            if number < first:
                continue
            assert number >= expected, "Ray Data has not kept the order of rows"
            for _ in range(expected, number):
                yield []
            yield list(group)
            expected = number + 1
        for _ in range(expected, number_of_batches):
            yield []
        first = 0
