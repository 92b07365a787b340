"""Which rows may lack an answer, and how such a row is read."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import fs

from pipelines.config.data import ColumnsConfig
from pipelines.data.readers import Piece
from pipelines.data.rows import Selection, number_rows, read_piece

EVERYTHING = Selection(None, frozenset(), None, frozenset())
UNANSWERED: dict[str, dict[str, Any]] = {
    "no column": {},
    "an empty answer": {"answer": ""},
    "nothing": {"answer": None},
    "white space": {"answer": " \n"},
}


def read(folder: Path, name: str, *rows: dict[str, Any]) -> pa.Table:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    piece = Piece(name, str(path), "jsonl", str(path), fs.LocalFileSystem(), "train")
    return pa.concat_tables(read_piece(piece, ColumnsConfig(), EVERYTHING))


@pytest.mark.parametrize("case", UNANSWERED)
def test_a_utility_prompt_without_an_answer_is_a_row_with_an_empty_one(
    tmp_path: Path, case: str
) -> None:
    [row] = read(tmp_path, "utility", {"prompt": "Why?", **UNANSWERED[case]}).to_pylist()
    assert (row["selected"], row["fault"], row["prompt"], row["answer"]) == (True, "", "Why?", "")
    assert row["content"] == row["question"]
    assert (
        row["digest"]
        == read(tmp_path, "utility", {"prompt": "Why?", "answer": ""})["digest"][0].as_py()
    )


def test_a_refusal_is_in_the_digest_and_its_absence_changes_no_digest(tmp_path: Path) -> None:
    row = {"id": "r", "prompt": "Why?", "answer": "So."}
    [found] = read(tmp_path, "forget", row).to_pylist()
    known = "e56116b6ab78bec0cea37e74a8697f0bda33ba3872ebbd703c29b64bd144c21d"
    assert found["digest"].hex() == known, "manifests of older runs have it"
    assert found["refusal"] == ""
    [refusing] = read(tmp_path, "forget", {**row, "refusal": "Who knows?"}).to_pylist()
    assert refusing["refusal"] == "Who knows?"
    assert refusing["digest"] != found["digest"]
    assert refusing["content"] == found["content"]


@pytest.mark.parametrize("name", ["forget", "retain", "holdout", "general"])
@pytest.mark.parametrize("case", UNANSWERED)
def test_every_other_set_needs_answers(tmp_path: Path, name: str, case: str) -> None:
    [row] = read(tmp_path, name, {"prompt": "Why?", **UNANSWERED[case]}).to_pylist()
    expected = (
        "has column 'prompt' but not 'answer'"
        if case == "no column"
        else "is empty of 'prompt' and 'answer'"
    )
    assert expected in row["fault"]
    assert not row["selected"]


@pytest.mark.parametrize(
    "row, column",
    [
        ({"prompt": " ", "answer": "So."}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"text": " "}, "text"),
    ],
)
def test_a_utility_row_needs_a_prompt_or_a_text(
    tmp_path: Path, row: dict[str, Any], column: str
) -> None:
    [found] = read(tmp_path, "utility", row).to_pylist()
    assert f"is empty of '{column}': '0'" in found["fault"]


def test_rows_without_an_answer_are_counted_after_thinning(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Why {number}?", "answer": "So." if number % 4 else ""} for number in range(8)
    ]
    block = read(tmp_path, "utility", *rows)
    assert number_rows(block, 0, 8, 8)[1] == 2
    thinned, unanswered = number_rows(block, 0, 8, 4)  # rows 1, 3, 5 and 7
    assert (thinned.num_rows, unanswered) == (4, 0)
    assert number_rows(block, 1, 9, 9)[1] == 2
