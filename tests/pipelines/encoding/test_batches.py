"""Which rows form a step: the same for any number of workers, and from any step on."""

from itertools import chain, islice, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import ray.data
from hypothesis import given
from hypothesis import strategies as st
from ray.data.block import BlockAccessor

from pipelines.encoding import batches as module
from pipelines.encoding.batches import Order, Stream, batches_of, plan_stream, share_of, windows_of
from pipelines.encoding.records import NUMBERS, columns_of

Key = tuple[str, int]


def block(lengths: list[int], name: str = "retain", first: int = 0) -> pa.Table:
    size = len(lengths)
    columns = {"row": range(first, first + size), "part": [0] * size, "length": lengths}
    return pa.table({"set": [name] * size, "input_ids": [[1]] * size, **columns})


def arranged(batch_size: int, seed: int, *blocks: pa.Table) -> pa.Table:
    """The rows of some blocks as one window."""
    size = sum(block.num_rows for block in blocks)
    return module._arrange(Order(batch_size, seed), 0, size, *blocks)


@pytest.mark.parametrize("lengths", [[[4]], [[3, 4], [5]], [[2, 2], [1, 7], [6]]])
def test_blocks_whose_rows_are_all_of_one_length_go_with_any_others(
    lengths: list[list[int]],
) -> None:
    blocks: list[Any] = []
    for of_block in lengths:
        records: list[dict[str, Any]] = []
        for length in of_block:
            numbers = dict.fromkeys(NUMBERS, 0) | {"row": len(records), "length": length}
            ids = list(range(length))
            records.append({"set": f"set {len(blocks)}", "input_ids": ids, **numbers})
        # As Ray Data makes a block of what a task returns.
        blocks.append(BlockAccessor.batch_to_block(columns_of(records)))
    table = arranged(2, 0, *blocks)
    found = {(row["set"], len(row["input_ids"])) for row in table.to_pylist()}
    assert found == {
        (f"set {index}", length) for index, of_block in enumerate(lengths) for length in of_block
    }


class Windows:
    """What `batches_of` needs of a Ray Data iterator."""

    def __init__(self, *windows: pa.Table) -> None:
        self.windows = windows

    def iter_batches(self, **_options: Any) -> Any:
        return iter(self.windows)


def streams(number_of_batches: int, workers: int, start: int, *windows: pa.Table) -> list[Any]:
    """What each worker reads of a stream, without end."""
    stream: Any = Windows(*windows)
    return [batches_of(stream, number_of_batches, rank, workers, start) for rank in range(workers)]


def steps(
    lengths: list[int], batch_size: int, workers: int, number: int, start: int = 0
) -> list[set[Key]]:
    """The rows of each step, over all workers."""
    batches = -(-len(lengths) // batch_size)
    of_workers = streams(batches, workers, start, arranged(batch_size, 0, block(lengths)))
    return [
        {(row["set"], row["row"]) for rows in step for row in rows}
        for step in islice(zip(*of_workers, strict=True), number)
    ]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 9), st.integers(1, 5))
def test_a_step_has_the_same_rows_with_any_number_of_workers(
    lengths: list[int], size: int, workers: int
) -> None:
    number = 2 * -(-len(lengths) // size)
    assert steps(lengths, size, workers, number) == steps(lengths, size, 1, number)


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=30),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(0, 70),
)
def test_a_resumed_stream_goes_on_where_it_was(
    lengths: list[int], size: int, workers: int, start: int
) -> None:
    whole = steps(lengths, size, workers, start + 5)
    assert steps(lengths, size, workers, 5, start=start) == whole[start:]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 9))
def test_an_epoch_holds_every_row_once(lengths: list[int], size: int) -> None:
    found = [key for rows in steps(lengths, size, 2, -(-len(lengths) // size)) for key in rows]
    assert sorted(found) == [("retain", row) for row in range(len(lengths))]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 9), st.integers(1, 5))
def test_workers_hold_as_many_rows_of_a_batch_as_each_other(
    lengths: list[int], size: int, workers: int
) -> None:
    table = arranged(size, 0, block(lengths))
    for batch in set(table["batch"].to_pylist()):
        held = [
            share_of(table, rank, workers)["batch"].to_pylist().count(batch)
            for rank in range(workers)
        ]
        assert held == sorted(held, reverse=True)
        assert held[0] - held[-1] <= 1


def test_rows_of_like_length_form_a_batch() -> None:
    lengths = [9, 1, 8, 2, 7, 3]
    spans = [{lengths[row] for _, row in rows} for rows in steps(lengths, 2, 1, 3)]
    assert sorted(map(sorted, spans)) == [[1, 2], [3, 7], [8, 9]]


def test_the_order_is_a_function_of_the_seed() -> None:
    table = block(list(range(1, 41)))
    first, again, other = (arranged(2, seed, table)["row"].to_pylist() for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_blocks_of_several_sets_are_one_stream() -> None:
    rows = arranged(2, 0, block([3, 1]), block([2, 4], "utility"))
    assert set(rows["batch"].to_pylist()) == {0, 1}
    assert sorted(zip(rows["set"].to_pylist(), rows["row"].to_pylist(), strict=True)) == [
        ("retain", 0),
        ("retain", 1),
        ("utility", 0),
        ("utility", 1),
    ]


def test_rows_out_of_order_are_an_error_not_a_loss() -> None:
    rows = arranged(2, 0, block([3, 1, 2, 5]))
    (read,) = streams(2, 1, 0, rows.take([2, 3, 0, 1]))
    with pytest.raises(AssertionError, match="order of rows"):
        list(islice(read, 3))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any), st.integers(1, 20))
def test_windows_cut_blocks_into_like_parts(sizes: list[int], limit: int) -> None:
    rows = [[(number, row) for row in range(size)] for number, size in enumerate(sizes)]
    windows = windows_of(sizes, limit)
    cut = [
        list(chain(*(rows[number] for number in window.blocks)))[window.start :][: window.rows]
        for window in windows
    ]
    assert list(chain(*cut)) == list(chain(*rows))
    of_windows = [window.rows for window in windows]
    assert max(of_windows) <= limit
    assert max(of_windows) - min(of_windows) <= 1


class Lengths:
    """An encoder of rows that are their lengths already."""

    mixes = False

    def encode_batch(self, batch: Any) -> dict[str, Any]:
        return {**batch, "input_ids": [[1] * length for length in batch["length"]]}


def lengths_of(number: int, *sets: str) -> pa.Table:
    """As many rows of each set, whose lengths follow from set and row."""
    blocks: list[pa.Table] = []
    for name in sets:
        lengths = np.random.default_rng(len(name)).integers(1, 30, number)
        blocks.append(block(lengths.tolist(), name).drop_columns(["input_ids"]))
    return pa.concat_tables(blocks)


def planned(rows: pa.Table, seed: int, cuts: list[int]) -> Stream:
    """A stream of rows that lie in blocks cut at these rows."""
    bounds = [0, *cuts, rows.num_rows]
    blocks = [rows.slice(low, high - low) for low, high in pairwise(bounds)]
    encoder: Any = Lengths()
    return plan_stream(ray.data.from_arrow(blocks), encoder, 4, seed)


def windows_in(stream: Stream) -> list[pa.Table]:
    refs: Any = stream.rows.to_arrow_refs()
    return ray.get(refs)


@pytest.mark.usefixtures("ray_session")
def test_a_stream_is_arranged_window_by_window_of_rows_from_all_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "WINDOW", 50)
    rows = lengths_of(100, "retain", "utility")
    stream = planned(rows, 0, [30, 31, 140])
    windows = windows_in(stream)
    assert [window.num_rows for window in windows] == [50, 50, 50, 50]
    # The sets lie one behind the other, and every window has its part of both.
    assert all(15 < window["set"].to_pylist().count("retain") < 35 for window in windows)
    whole = pa.concat_tables(windows)
    assert set(zip(whole["set"].to_pylist(), whole["row"].to_pylist(), strict=True)) == set(
        zip(rows["set"].to_pylist(), rows["row"].to_pylist(), strict=True)
    )
    assert whole["batch"].to_pylist() == sorted(whole["batch"].to_pylist())
    assert set(whole["batch"].to_pylist()) == set(range(stream.batches))
    # The order is the seed's, and not the blocks'.
    assert pa.concat_tables(windows_in(planned(rows, 0, [99]))).equals(whole)
    other = pa.concat_tables(windows_in(planned(rows, 1, [99])))
    assert other["row"].to_pylist() != whole["row"].to_pylist()
    # Workers read it, any number of them and from any batch on, as one of them reads it whole.
    whole_steps = read_by(1, 0, stream)
    assert read_by(3, 0, stream) == whole_steps
    assert read_by(2, 17, stream) == whole_steps[17:]


def read_by(workers: int, start: int, stream: Stream) -> list[list[Key]]:
    """The rows of each step of one pass, in order, over all workers."""
    iterators = [
        batches_of(stream.rows.iterator(), stream.batches, rank, workers, start)
        for rank in range(workers)
    ]
    steps: list[list[Key]] = []
    for of_workers in islice(zip(*iterators, strict=True), stream.batches - start):
        steps.append(sorted((row["set"], row["row"]) for rows in of_workers for row in rows))
    return steps


@pytest.mark.usefixtures("ray_session")
def test_a_stream_of_one_window_is_not_drawn() -> None:
    rows = lengths_of(30, "retain")
    (window,) = windows_in(planned(rows, 3, [7]))
    encoded = rows.append_column(
        "input_ids", pa.array([[1] * length for length in rows["length"].to_pylist()])
    )
    assert window["row"].to_pylist() == arranged(4, 3, encoded)["row"].to_pylist()
