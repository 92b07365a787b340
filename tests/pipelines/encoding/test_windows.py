"""Windows over long rows: every token of an answer counts once, behind all the context that fits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.config.schema import ModelConfig
from pipelines.encoding.labelled import ClassEncoder
from pipelines.encoding.text import TextEncoder
from pipelines.encoding.windows import Lengths, RowLength, lengths_of, treatment, windows_of
from rfa.batch import collate

ROW = st.integers(2, 400).flatmap(
    lambda length: st.tuples(st.just(length), st.integers(1, length - 1))
)


@given(ROW, st.integers(8, 64))
def test_each_token_of_an_answer_is_counted_in_exactly_one_window(
    row: tuple[int, int], most: int
) -> None:
    length, start = row
    ids = list(range(length))
    windows = windows_of(ids, start, most)
    counted = [token for window in windows for token in window.input_ids[window.answer_start :]]
    assert counted == ids[start:]
    for window in windows:
        assert len(window.input_ids) <= most
        assert window.input_ids == ids[window.first : window.first + len(window.input_ids)]
        assert window.answer_start >= 1, "nothing predicts a window's first token"


@given(ROW, st.integers(8, 64))
def test_context_is_all_that_fits(row: tuple[int, int], most: int) -> None:
    length, start = row
    windows = windows_of(list(range(length)), start, most)
    if length - start < most:
        assert len(windows) == 1, "an answer that fits stays whole"
    for window in windows:
        left_out = window.first > 0
        assert not left_out or len(window.input_ids) == most
        if len(windows) > 1:
            before = window.first + window.answer_start
            assert window.answer_start >= min(before, most - most // 2)


@given(ROW, st.integers(8, 64), st.data())
def test_the_parts_of_a_fact_are_the_fact(row: tuple[int, int], most: int, data: Any) -> None:
    length, start = row
    first = data.draw(st.integers(start, length - 1))
    end = data.draw(st.integers(first + 1, length))
    found: list[int] = []
    for window in windows_of(list(range(length)), start, most):
        found += window.input_ids[slice(*window.part_of(first, end))]
    assert found == list(range(first, end))


def test_a_set_is_as_long_as_its_blocks_together() -> None:
    one = lengths_of(["a", "b"], [RowLength(9, 2), RowLength(3, 1)], most=8)
    other = lengths_of(["c"], [RowLength(5, 1)], most=8)
    whole = Lengths(tokens=17, windows=4, longest_read=8, long_rows=1, long_ids=["a"])
    assert one + other == whole == other + one
    assert other.longest_read == 5


def encoded(encoder: TextEncoder, rows: list[dict[str, Any]]) -> list[Any]:
    """The rows that a worker trains on."""
    batch = {}
    for name in ("set", "row", "prompt", "answer", "fact", "label"):
        batch[name] = np.asarray([row[name] for row in rows], dtype=object)
    batch["refusal"] = np.full(len(rows), "")
    columns = encoder.encode_batch(batch)
    number = len(columns["row"])
    return encoder.rows([{name: columns[name][i] for name in columns} for i in range(number)])


def test_forget_rows_are_trained_on_whole_and_kept_rows_are_cut(problem: Path) -> None:
    encoder = TextEncoder(ModelConfig(path=f"{problem}/model"), None, 32)
    fact = "the very last words of the answer"
    row = {
        "set": "forget",
        "row": 7,
        "prompt": "word " * 500,
        "answer": "What author wrote this and that? " * 20 + fact,
        "fact": fact,
        "label": "Anna",
    }
    ids, start = encoder.pair(row["prompt"], row["answer"])
    rows = encoded(encoder, [row, {**row, "set": "retain"}, {**row, "prompt": "", "answer": "No"}])
    *windows, kept, short = rows
    assert len(windows) == encoder.length(row).windows > 5
    assert encoder.length({**row, "set": "retain"}) == RowLength(len(ids), 1)
    assert kept.input_ids == windows[0].input_ids
    assert len(short.input_ids) < 32
    batch = collate([], windows, encoder.pad_token_id)
    assert batch.counts("all").forget_answer == len(ids) - start
    assert batch.row_B.tolist() == [7] * len(windows)
    said = encoder.tokenizer.decode(batch.expected(batch.fact_BT))
    assert said.strip() == fact
    assert {window.label for window in windows} == {kept.label}


@pytest.mark.parametrize("name", ["forget", "holdout", "earlier"])
def test_documents_are_covered_to_their_last_token(problem: Path, name: str) -> None:
    encoder = TextEncoder(ModelConfig(path=f"{problem}/model"), None, 16)
    lines = (problem / "data" / "forget.jsonl").read_text().splitlines()
    text = " ".join(json.loads(line)["answer"] for line in lines)
    row = {"set": name, "row": 0, "prompt": "", "answer": text, "fact": "", "label": ""}
    ids, _ = encoder.pair("", text)
    tokens: list[int] = []
    for window in encoded(encoder, [row]):
        tokens += window.input_ids[window.answer_start :]
    assert tokens == ids[1:]


def test_only_sets_that_are_trained_on_are_said_to_be_cut() -> None:
    lengths = Lengths(tokens=99, windows=12, longest_read=8, long_rows=3, long_ids=[])
    names = ("forget", "holdout", "earlier", "retain", "utility", "general", "neighbours")
    told = {name: treatment(name, lengths) for name in names}
    assert told["forget"] == told["holdout"] == told["earlier"] == "read in 12 windows"
    assert told["retain"] == told["utility"] == "cut in training"
    assert told["general"] == told["neighbours"] == "scored in windows"


def test_a_row_says_which_of_the_held_sets_it_is_of(problem: Path) -> None:
    encoder = TextEncoder(ModelConfig(path=f"{problem}/model"), None, 32)
    row = {"row": 0, "prompt": "Who?", "answer": "Me.", "fact": "", "label": ""}
    names = ("retain", "utility", "earlier")
    rows = encoded(encoder, [{**row, "set": name} for name in names])
    of_classes = ClassEncoder(encoder.model, 32, reads_images=False)
    record = {"row": 0, "input_ids": [1, 2], "label": 3}
    classified = of_classes.rows([{**record, "set": name} for name in names])
    for own in (rows, classified):
        assert [one.utility for one in own] == [False, True, False]
        assert [one.earlier for one in own] == [False, False, True]
