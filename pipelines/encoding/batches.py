"""The rows of each step, and the share of them that each worker holds.

Rows of similar length form a batch, because a batch is padded to its longest row. The order of
batches is a function of the seed alone. Every worker holds its own share of each batch, so that a
step sees the same rows with any number of workers, and a resumed run continues where it was.

A stream of more than WINDOW rows is cut into windows of rows drawn from all of it, which are
arranged one by one. So no process ever holds a stream: its tokens lie in Ray's object store, 4
bytes each, which moves to disk what does not fit.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions when it is imported)

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate, groupby, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import DataIterator, Dataset, ExecutionOptions
from ray.train import DataConfig

from pipelines.cluster.tasks import this_node
from pipelines.data.rows import each_row

if TYPE_CHECKING:
    from pipelines.encoding.encoder import Encoder

WINDOW = 2**17  # rows that are arranged together, at most
PLACE = "place"


class Stream(NamedTuple):
    """Tokenised rows of one kind in the order of their batches, and the number of batches.

    A block is a window: it holds whole batches.
    """

    rows: Dataset
    batches: int


class Window(NamedTuple):
    """Consecutive rows of some blocks, which are arranged together.

    `blocks` are the numbers of the blocks, and `start` and `rows` a range of their rows.
    """

    blocks: range
    start: int
    rows: int


def plan_stream(rows: Dataset, encoder: "Encoder", batch_size: int, seed: int) -> Stream:
    """Tokenise rows and cut them into batches.

    All of it happens before training: while the workers hold the CPUs, no other task could run.
    The tokens end on the driver's node, where they outlive the workers' nodes.
    """
    tokens = rows.map_batches(encoder.encode_batch, batch_format="numpy").materialize()
    if tokens.count() > WINDOW:
        place = partial(with_place, seed=seed)
        tokens = tokens.map_batches(place, batch_format="pyarrow").sort(PLACE).materialize()
    blocks = tokens.to_arrow_refs()
    arrange: Any = ray.remote(_arrange).options(scheduling_strategy=this_node())
    batches = 0
    arranged: list[Any] = []
    for index, window in enumerate(windows_of(_sizes(blocks), WINDOW)):
        of_window = [blocks[number] for number in window.blocks]
        order = Order(batch_size, seed, index, batches, encoder.mixes)
        arranged.append(arrange.remote(order, window.start, window.rows, *of_window))
        batches += -(-window.rows // batch_size)
    stream = ray.data.from_arrow_refs(arranged)
    stream.context.enable_progress_bars = False
    return Stream(stream, batches)


def with_place(rows: pa.Table, seed: int) -> pa.Table:
    """Return rows with a column PLACE: a number drawn for each, which depends on seed and row."""
    import pandas

    hashes: Any = pandas.util
    keys = rows.select(["set", "row", "part"]).to_pandas().assign(seed=seed)
    place_N = hashes.hash_pandas_object(keys, index=False).to_numpy()
    return rows.append_column(PLACE, pa.array(place_N.view(np.int64)))


def _sizes(blocks: Sequence[Any]) -> list[int]:
    size: Any = ray.remote(_size)
    return ray.get([size.remote(block) for block in blocks])


def _size(block: pa.Table) -> int:
    return block.num_rows


def windows_of(sizes: Sequence[int], limit: int) -> list[Window]:
    """Cut blocks of these sizes into windows of nearly equal size, of at most `limit` rows."""
    first_rows = list(accumulate(sizes, initial=0))
    total = first_rows[-1]
    number = -(-total // limit)
    bounds = [total * index // number for index in range(number + 1)]
    windows: list[Window] = []
    for start, stop in pairwise(bounds):
        first_block = bisect_right(first_rows, start) - 1
        blocks = range(first_block, bisect_left(first_rows, stop))
        windows.append(Window(blocks, start - first_rows[first_block], stop - start))
    return windows


class Order(NamedTuple):
    """How a window of rows becomes batches.

    `window` is its number, and `first_batch` that of its first batch in the stream. With `mixes` a
    batch's rows come from the whole window, among rows of equal length.
    """

    batch_size: int
    seed: int
    window: int = 0
    first_batch: int = 0
    mixes: bool = False


def _arrange(order: Order, start: int, size: int, *blocks: pa.Table) -> pa.Table:
    """Return so many rows of the blocks, from `start` on, in their order, with a column `batch`."""
    table = pa.concat_tables(blocks).slice(start, size)
    if PLACE in table.column_names:
        table = table.drop_columns([PLACE])
    ids = table.schema.get_field_index("input_ids")
    small = table["input_ids"].cast(pa.list_(pa.int32()))  # half the memory
    table = table.set_column(ids, "input_ids", small)
    draw = np.random.default_rng((order.seed, order.window))
    length = table["length"].to_numpy()
    # Length decides first, then the row, so that the order does not depend on the blocks.
    row = [table[name].to_numpy() for name in ("part", "row", "set")]
    by_length = np.lexsort((*row, length))
    if order.mixes:
        by_length = draw.permutation(by_length)
        by_length = by_length[np.argsort(length[by_length], kind="stable")]
    batches = np.array_split(by_length, -(-len(by_length) // order.batch_size))
    shuffled = draw.permutation(len(batches))
    rows = np.concatenate([batches[index] for index in shuffled])
    sizes = np.asarray([len(batch) for batch in batches])[shuffled]
    numbers = order.first_batch + np.repeat(np.arange(len(batches)), sizes)
    return table.take(rows).append_column("batch", pa.array(numbers, pa.int64()))


def whole_streams() -> DataConfig:
    """Return a configuration that hands every worker all of a stream, of which it takes its share.

    The number of workers may differ from the last start, and while they hold all CPUs no task could
    cut the shares anew.
    """
    return DataConfig(datasets_to_split=[], execution_options=ExecutionOptions(preserve_order=True))


def share_of(table: pa.Table, rank: int, world_size: int) -> pa.Table:
    """Return the rows whose position in their batch is `rank` modulo the number of workers."""
    batch_N = table["batch"].to_numpy()
    # The rows of a batch are adjacent, so a binary search finds the first of them.
    position_N = np.arange(len(batch_N)) - np.searchsorted(batch_N, batch_N)
    return table.filter(pa.array(position_N % world_size == rank))


def batches_of(
    stream: DataIterator, number_of_batches: int, rank: int, world_size: int, start: int = 0
) -> Iterator[list[dict[str, Any]]]:
    """Yield a worker's rows of batch after batch without end, from batch `start` on.

    A batch is empty where the worker has no share of it.
    """
    first = start % number_of_batches
    while True:
        expected = first
        rows = _rows_of(stream, rank, world_size, first)
        for number, group in groupby(rows, key=lambda row: row["batch"]):
            assert number >= expected, "Ray Data has not kept the order of rows"
            for _ in range(expected, number):
                yield []
            yield list(group)
            expected = number + 1
        for _ in range(expected, number_of_batches):
            yield []
        first = 0


def _rows_of(stream: Any, rank: int, world_size: int, first: int) -> Iterator[dict[str, Any]]:
    """Yield a worker's rows of a stream, from batch `first` on."""
    for window in stream.iter_batches(batch_size=None, batch_format="pyarrow"):
        # Batches are in order, and those before the first are passed over unread.
        start = int(np.searchsorted(window["batch"].to_numpy(), first))
        yield from each_row(share_of(window.slice(start), rank, world_size))
