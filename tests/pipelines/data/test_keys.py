"""Ids and hashes, compared block by block where they lie, as a comparison of all at once finds them."""

import random
from collections import Counter
from typing import Any

import pyarrow as pa
import pytest
import ray

from pipelines.data import keys as module
from pipelines.data.keys import ids_in_order, repeated_ids, shared_rows

Key = tuple[str, bytes, bytes]  # id, content, question

pytestmark = pytest.mark.usefixtures("ray_session")


def in_blocks(rows: list[Key], size: int) -> list[Any]:
    """References to the keys of some rows, in blocks of so many."""
    names = dict(zip(module.KEYS, (pa.string(), pa.binary(), pa.binary()), strict=True))
    schema = pa.schema(list(names.items()))
    blocks: list[Any] = []
    for start in range(0, len(rows), size):
        part = [dict(zip(names, row, strict=True)) for row in rows[start : start + size]]
        blocks.append(ray.put(pa.Table.from_pylist(part, schema=schema)))
    return blocks


def some_rows(seed: int, number: int, *, prompts_only: float = 0.0) -> list[Key]:
    draw = random.Random(seed)
    rows: list[Key] = []
    for _ in range(number):
        question = bytes([draw.randrange(60)])
        content = (
            question if draw.random() < prompts_only else question + bytes([draw.randrange(3)])
        )
        rows.append((f"id {draw.randrange(200)}", content, question))
    return rows


@pytest.mark.parametrize("limit", [4, 1000])
def test_ids_that_come_twice_are_found_wherever_they_lie(
    monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(module, "IDS_AT_ONCE", limit)
    rows = some_rows(0, 40)
    counts = Counter(row_id for row_id, _, _ in rows)
    repeated = {row_id for row_id, number in counts.items() if number > 1}
    found = repeated_ids(in_blocks(rows, 7), len(rows))
    assert found.number == len(repeated) > 2
    assert set(found.ids) <= repeated
    assert len(found.ids) == min(len(repeated), 5)
    once = [rows[0], *(row for row in rows if counts[row[0]] == 1)]
    assert repeated_ids(in_blocks(list(dict.fromkeys(once)), 7), len(once)) == (0, [])


@pytest.mark.parametrize("prompts_only", [0.0, 0.3])
def test_rows_of_two_sets_are_compared_by_content_and_by_prompt_where_there_is_no_more(
    prompts_only: float,
) -> None:
    forget, other = some_rows(1, 30), some_rows(2, 12, prompts_only=prompts_only)
    contents = {content for _, content, _ in other}
    prompts = {question for _, content, question in other if content == question}
    shared = [
        row for row, content, question in forget if content in contents or question in prompts
    ]
    found = shared_rows(in_blocks(forget, 11), in_blocks(other, 5))
    assert found == (len(shared), shared[:5])
    assert 0 < len(shared) < len(forget)


def test_no_row_of_unlike_sets_is_shared() -> None:
    forget = [("a", b"1x", b"1"), ("b", b"2x", b"2")]
    assert shared_rows(in_blocks(forget, 1), in_blocks([("a", b"1y", b"1")], 1)) == (0, [])


def test_ids_come_in_the_order_of_the_blocks() -> None:
    rows = some_rows(3, 20)
    assert ids_in_order(in_blocks(rows, 6)) == [row_id for row_id, _, _ in rows]
