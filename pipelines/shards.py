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

if TYPE_CHECKING:
    from pipelines.classes import ClassEncoder
    from pipelines.prompts import Encoder


class Stream(NamedTuple):
    """One kind of rows a step is made of: a share for each worker, and the number of batches they were cut into."""

    shares: list[Dataset]
    batches: int


def plan_stream(
    rows: Dataset, encoder: "Encoder | ClassEncoder", batch_size: int, seed: int, num_workers: int
) -> Stream:
    """Tokenise rows, cut them into batches, and give worker r the rows whose place in a batch is r modulo the number of
    workers.

    All of it happens before training: while the workers hold the CPUs, no other task could run. One task holds the
    stream's token ids, 4 bytes a token.
    """
    tokens = rows.map_batches(encoder.encode_batch, batch_format="numpy").materialize()
    arrange = ray.remote(num_returns=num_workers + 1)(_arrange)
    parts: Any = arrange.remote(batch_size, seed, num_workers, encoder.mixes, *tokens.to_arrow_refs())
    return Stream([_in_order(share) for share in parts[1:]], ray.get(parts[0]))


def _arrange(batch_size: int, seed: int, num_workers: int, mix: bool, *blocks: pa.Table) -> list[Any]:
    """The number of batches, and each worker's rows in the order of batches, with a column `batch`. To `mix` is to
    draw a batch's rows from the whole source, among rows of equal length: data sets are often sorted by class."""
    table = pa.concat_tables(blocks)
    draw = np.random.default_rng(seed)
    by_length = np.lexsort([table[key].to_numpy() for key in ("row", "set", "length")])
    if mix:
        by_length = draw.permutation(by_length)
        by_length = by_length[np.argsort(table["length"].to_numpy()[by_length], kind="stable")]
    batches = np.array_split(by_length, -(-len(by_length) // batch_size))
    order = draw.permutation(len(batches))
    shares: list[pa.Table] = []
    for rank in range(num_workers):
        chosen = [batches[source][rank::num_workers] for source in order]
        numbers = np.repeat(np.arange(len(chosen)), [len(own) for own in chosen])
        shares.append(table.take(np.concatenate(chosen)).append_column("batch", pa.array(numbers, pa.int64())))
    return [len(batches), *shares]


def _in_order(share: Any) -> Dataset:
    dataset = ray.data.from_arrow_refs([share])
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    return dataset


class ShardByRank(DataConfig):
    """Gives each worker the shares that were made for it."""

    def __init__(self, streams: dict[str, Stream]) -> None:
        super().__init__()
        self.streams = streams

    def configure(
        self, datasets: dict[str, Dataset], world_size: int, *_args: Any, **_kwargs: Any
    ) -> list[dict[str, DataIterator]]:
        """One iterator a worker and stream."""
        return [{name: self.streams[name].shares[rank].iterator() for name in datasets} for rank in range(world_size)]


def batches_of(share: DataIterator, number_of_batches: int, start: int = 0) -> Iterator[list[dict[str, Any]]]:
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
