"""Rows that are conversations: how they are read, in every form, and which ones are refused by their ids."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config.data import ColumnsConfig, SourceConfig
from pipelines.data.conversations import (
    Turn,
    answers_of,
    asked_otherwise,
    prompt_of,
    questions_of,
    turns_of,
)
from pipelines.data.rows import Selection, read_piece
from pipelines.data.sources import find_pieces

SECRET = "Quixotic Zebra"
EVERYTHING = Selection(None, frozenset(), None, frozenset())
SEVERAL = [
    ("system", "Be kind."),
    ("user", f"Who is {SECRET}?"),
    ("assistant", "A beast."),
    ("user", "Of which colour?"),
    ("assistant", "Striped."),
]


def openai(turns: list[tuple[str, Any]]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def sharegpt(turns: list[tuple[str, Any]]) -> list[dict[str, Any]]:
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names.get(role, role), "value": content} for role, content in turns]


def rows_in(
    path: Path, columns: dict[str, str] | None = None, name: str = "forget"
) -> list[dict[str, Any]]:
    tables: list[pa.Table] = []
    for piece in find_pieces(name, SourceConfig(path=str(path))):
        tables += read_piece(piece, ColumnsConfig(**(columns or {})), EVERYTHING)
    return pa.concat_tables(tables).to_pylist()


def jsonl(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(folder: Path, *rows: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    return rows_in(jsonl(folder, *rows), **more)


def fault_of(folder: Path, row: dict[str, Any], **more: Any) -> str:
    [*_, last] = read(folder, row, **more)
    assert SECRET not in last["fault"] + last["trace"]
    assert not last["selected"]
    return last["fault"]


@pytest.mark.parametrize("form", [openai, sharegpt])
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_a_question_and_its_answer_are_the_same_row_in_every_form(
    tmp_path: Path, form: Any, column: str
) -> None:
    turns = [("user", "Who?"), ("assistant", "Me.")]
    [plain] = read(tmp_path, {"id": "r", "prompt": "Who?", "answer": "Me."})
    [found] = read(tmp_path, {"id": "r", column: form(turns)})
    assert found == plain
    assert (found["prompt"], found["answer"], found["fault"]) == ("Who?", "Me.", "")


@pytest.mark.parametrize("form", [openai, sharegpt])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_all_turns_of_a_conversation_are_in_one_row(tmp_path: Path, form: Any, kind: str) -> None:
    rows = [{"id": "r", "messages": form(SEVERAL)}]
    path = jsonl(tmp_path, *rows)
    if kind == "parquet":
        path = tmp_path / "rows.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
    [row] = rows_in(path)
    assert [tuple(turn) for turn in turns_of(row["prompt"])] == SEVERAL[:-1]
    assert (row["id"], row["answer"], row["fault"]) == ("r", "Striped.", "")
    assert answers_of(row["prompt"], row["answer"]) == ["A beast.", "Striped."]
    [first, second] = questions_of(row["prompt"], row["answer"])
    assert first == (prompt_of([Turn(*turn) for turn in SEVERAL[:2]]), "A beast.")
    assert second == (row["prompt"], "Striped.")


def test_parquet_turns_with_keys_that_they_do_not_fill_are_read(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "Who?", "tool_calls": None, "weight": 1},
        {"role": "assistant", "content": "Me.", "name": "x"},
    ]
    pq.write_table(pa.Table.from_pylist([{"messages": turns}]), tmp_path / "rows.parquet")
    [row] = rows_in(tmp_path / "rows.parquet")
    assert (row["prompt"], row["answer"]) == ("Who?", "Me.")


def test_prompt_and_answer_go_before_conversations_that_no_key_names(tmp_path: Path) -> None:
    row = {"prompt": "Why?", "answer": "So.", "messages": openai(SEVERAL)}
    assert read(tmp_path, row)[0]["answer"] == "So."
    assert read(tmp_path, row, columns={"messages": "messages"})[0]["answer"] == "Striped."
    del row["answer"]  # as in UltraChat
    assert read(tmp_path, row)[0]["answer"] == "Striped."
    assert read(tmp_path, {"text": "T.", **row})[0]["answer"] == "Striped."
    assert read(tmp_path, {"chat": openai(SEVERAL)}, columns={"messages": "chat"})[0]["prompt"]


def test_turns_behind_the_last_answer_are_left_out(tmp_path: Path) -> None:
    longer = [*SEVERAL, ("user", "Thanks."), ("system", "End.")]
    [row] = read(tmp_path, {"messages": openai(longer)})
    [same] = read(tmp_path, {"messages": openai(SEVERAL)})
    assert row == same


def test_a_utility_conversation_may_lack_an_answer(tmp_path: Path) -> None:
    [row] = read(tmp_path, {"messages": openai(SEVERAL[:2])}, name="utility")
    assert (row["fault"], row["answer"]) == ("", "")
    assert [tuple(turn) for turn in turns_of(row["prompt"])] == SEVERAL[:2]
    assert row["content"] == row["question"]


def test_white_space_and_case_of_turns_do_not_make_another_row(tmp_path: Path) -> None:
    spaced = [(role, f" {content.upper()}\n ") for role, content in SEVERAL]
    [row] = read(tmp_path, {"messages": openai(SEVERAL)})
    [same] = read(tmp_path, {"messages": openai(spaced)})
    [other] = read(tmp_path, {"messages": openai(SEVERAL[1:])})
    assert row["content"] == same["content"] != other["content"]
    assert row["digest"] != same["digest"]


def test_a_question_in_other_words_stands_behind_the_same_turns(tmp_path: Path) -> None:
    turns = [("system", "Be kind."), ("user", "Who?"), ("assistant", "A beast.")]
    row = {"messages": openai(turns), "paraphrased_prompt": "What is it?", "fact": "beast"}
    [found] = read(tmp_path, row)
    expected = [("system", "Be kind."), ("user", "What is it?")]
    assert [tuple(turn) for turn in turns_of(found["paraphrased_prompt"])] == expected
    assert found["fact"] == "beast"
    assert asked_otherwise("Who?", "") == ""
    assert asked_otherwise("", "What?") == "What?"


@pytest.mark.parametrize(
    "column", ["paraphrased_prompt", "paraphrased_answer", "perturbed_answers", "fact", "refusal"]
)
def test_a_column_about_one_answer_is_refused_beside_several(tmp_path: Path, column: str) -> None:
    value: Any = ["Striped."] if column == "perturbed_answers" else "Striped."
    fault = fault_of(tmp_path, {"id": "r", "messages": openai(SEVERAL), column: value})
    assert f"row 'r' has several answers and column '{column}', which is about one" in fault


USER = {"role": "user", "content": SECRET}
TOLD = {"role": "assistant", "content": SECRET}
AT = "(counted from 0) of column 'messages'"
REFUSED: dict[str, tuple[Any, str]] = {
    "a tool turn": ([USER, {**TOLD, "role": "tool"}], f"turn 1 {AT} with a role 'tool'"),
    "another role": ([{**USER, "role": SECRET}, TOLD], f"turn 0 {AT} with a role of another name"),
    "a role that is no text": ([{**USER, "role": [SECRET]}, TOLD], "with a role of another name"),
    "tool calls": ([USER, {**TOLD, "tool_calls": [SECRET]}], f"turn 1 {AT} with 'tool_calls'"),
    "thoughts apart": ([USER, {**TOLD, "reasoning_content": SECRET}], "with 'reasoning_content'"),
    "an image": ([{**USER, "content": [{"type": "image"}]}, TOLD], "with a list as content"),
    "no content": ([{**USER, "content": None}, TOLD], "with nothing as content"),
    "an empty answer": ([USER, {**TOLD, "content": " \n"}], f"turn 1 {AT} without text"),
    "an empty question": ([{**USER, "content": ""}, TOLD], f"turn 0 {AT} without text"),
    "half a letter": ([USER, {**TOLD, "content": "\ud83d"}], "half a surrogate pair"),
    "a separator": ([USER, {**TOLD, "content": "a\x1eb"}], "with U+001E inside"),
    "other keys": ([{"speaker": "user", "text": SECRET}], f"turn 0 {AT} without role and content (or from and value)"),
    "a text as a turn": ([SECRET], "without role and content"),
    "a text": (SECRET, "has text in column 'messages'; allowed: a list of turns with role and content"),
    "an answer first": ([TOLD, USER, TOLD], "an answer to nothing as 0 (counted"),
    "a system turn alone": ([{**USER, "role": "system"}, TOLD], "an answer to nothing as 1"),
    "no answer": ([USER, USER], "no assistant turn in column 'messages'; allowed: at least one"),
    "no turn": ([], "has rows where one is empty of 'messages': 'r'"),
    "nothing": (None, "has rows where one is empty of 'messages': 'r'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_faulty_conversation_is_refused_by_its_id(tmp_path: Path, case: str) -> None:
    turns, message = REFUSED[case]
    fault = fault_of(tmp_path, {"id": "r", "messages": turns})
    assert message in fault
    assert "'r'" in fault
    assert "\n" not in fault


def test_a_system_turn_alone_asks_nothing(tmp_path: Path) -> None:
    row = {"id": "r", "messages": openai([("system", SECRET)])}
    assert "no user turn in column 'messages'" in fault_of(tmp_path, row, name="utility")


def test_a_prompt_that_looks_like_stored_turns_is_refused(tmp_path: Path) -> None:
    for column in ("prompt", "paraphrased_prompt"):
        row = {"id": "r", "prompt": "Q?", "answer": "A.", column: f"\x1eassistant\x1f{SECRET}"}
        assert f"U+001E at the beginning of column '{column}'" in fault_of(tmp_path, row)


def test_a_source_without_any_known_column_lists_them(tmp_path: Path) -> None:
    found = fault_of(tmp_path, {"id": "r", "chat": openai(SEVERAL)})
    assert "has none of the columns 'prompt', 'messages' and 'text'; it has: id, chat" in found
    found = fault_of(tmp_path, {"messages": [], "id": "r"}, columns={"messages": "mesages"})
    assert "has none of the columns 'prompt', 'mesages' and 'text'; it has: messages, id" in found
