"""Which rows form a step: the same for any number of workers, and from any step on."""

from itertools import islice
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.data.block import BlockAccessor

from pipelines.encoding.batches import _arrange, batches_of, share_of
from pipelines.encoding.records import NUMBERS, columns_of

Key = tuple[str, int]


def block(lengths: list[int], name: str = "retain", first: int = 0) -> pa.Table:
    columns = {"row": range(first, first + len(lengths)), "length": lengths}
    return pa.table({"set": [name] * len(lengths), "input_ids": [[1]] * len(lengths), **columns})


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
    _, table = _arrange(2, 0, False, *blocks)
    found = {(row["set"], len(row["input_ids"])) for row in table.to_pylist()}
    assert found == {
        (f"set {index}", length) for index, of_block in enumerate(lengths) for length in of_block
    }


class Share:
    """What `batches_of` needs of a Ray Data iterator."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def iter_rows(self) -> Any:
        return iter(self.table.to_pylist())


def steps(
    lengths: list[int], batch_size: int, workers: int, number: int, start: int = 0
) -> list[set[Key]]:
    """The rows of each step, over all workers."""
    batches, table = _arrange(batch_size, 0, False, block(lengths))
    shares = [share_of(table, rank, workers) for rank in range(workers)]
    streams = [islice(batches_of(Share(share), batches, start), number) for share in shares]  # pyright: ignore
    return [
        {(row["set"], row["row"]) for rows in step for row in rows}
        for step in zip(*streams, strict=True)
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
    _, table = _arrange(size, 0, False, block(lengths))
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
    first, again, other = (
        _arrange(2, seed, False, table)[1]["row"].to_pylist() for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_blocks_of_several_sets_are_one_stream() -> None:
    batches, rows = _arrange(2, 0, False, block([3, 1]), block([2, 4], "utility"))
    assert batches == 2
    assert sorted(zip(rows["set"].to_pylist(), rows["row"].to_pylist(), strict=True)) == [
        ("retain", 0),
        ("retain", 1),
        ("utility", 0),
        ("utility", 1),
    ]


def test_rows_out_of_order_are_an_error_not_a_loss() -> None:
    _, rows = _arrange(2, 0, False, block([3, 1, 2, 5]))
    with pytest.raises(AssertionError, match="order of rows"):
        list(islice(batches_of(Share(rows.take([2, 3, 0, 1])), 2), 3))  # pyright: ignore
