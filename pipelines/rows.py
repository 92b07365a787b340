"""What a worker makes of a source's rows: the same columns for every set, the wanted rows only, content hashes.

Each row becomes (id, prompt, answer, ...) as text, whatever its source calls them and however it types them. A fault
travels to the driver as a row of its own (`fault`), not as an exception, because Ray prints exceptions at length.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions when it is imported)

import hashlib
import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.config import ColumnsConfig
from pipelines.sources import CHUNK_ROWS, Piece, SourceError, id_text, is_unicode, open_rows

SHOWN = 5  # ids that a message names
TEXTS = ("prompt", "answer", "paraphrased_prompt", "paraphrased_answer", "fact")
SET_SCHEMA = pa.schema(
    [("set", pa.string()), ("row", pa.int64()), ("id", pa.string())]
    + [(name, pa.string()) for name in TEXTS]
    + [("perturbed_answers", pa.list_(pa.string())), ("label", pa.string())]
)
READ_SCHEMA = pa.schema(
    [field for field in SET_SCHEMA if field.name != "row"]
    + [
        pa.field("kept", pa.bool_()),  # false: a row that is left out, told of only for its id or value
        pa.field("value", pa.string()),  # the selected value of the column that `values` selects by
        pa.field("fault", pa.string()),  # a message for the user, or ''
        pa.field("content", pa.binary(16)),  # equal where prompt and answer are, up to white space and case
        pa.field("question", pa.binary(16)),  # the content of the same row without its answer
        pa.field("digest", pa.binary(32)),  # of the whole row
    ]
)
BLANK = {
    "id": "", **dict.fromkeys(TEXTS, ""), "perturbed_answers": [], "label": "", "kept": False, "value": "", "fault": "",
    "content": bytes(16), "question": bytes(16), "digest": bytes(32),
}  # fmt: skip
SUMMARY = ["id", "kept", "value", "fault", "content", "question"]
ANSWERED_BY_MODEL = "utility"  # the set whose rows may lack an answer: `pipelines.own_answers` gives them one


@dataclass(frozen=True)
class Selection:
    """Which rows of a source are taken: all conditions hold."""

    ids: frozenset[str] | None  # only these
    exclude_ids: frozenset[str]  # none of these
    column: str | None  # only rows with one of `values` in this column
    values: frozenset[str]

    def takes(self, row_id: str, value: str | None) -> bool:
        wanted = self.ids is None or row_id in self.ids
        return wanted and row_id not in self.exclude_ids and (self.column is None or value in self.values)


class Summary(NamedTuple):
    """What the driver learns of a block: no text."""

    set: str | None  # None where the block is empty
    rows: pa.Table  # the columns SUMMARY
    digest: int  # of the kept rows; digests of blocks add up


def read_piece(piece: Piece, columns: ColumnsConfig, selection: Selection) -> Iterator[pa.Table]:
    """The wanted rows of a piece as tables of READ_SCHEMA; a fault becomes the last row and ends the reading."""
    chunk: list[dict[str, Any]] = []
    try:
        for row in _rows(piece, columns, selection):
            chunk.append(row)
            if len(chunk) == CHUNK_ROWS:
                yield _table(piece.set, chunk)
                chunk = []
    except SourceError as fault:
        separator = ": " if fault.text.startswith(("line ", "row")) else " "
        message = f"data.{piece.set}.{fault.key}: {piece.shown}{separator}{fault.text}"
        chunk = [{**BLANK, "fault": message}]
    yield _table(piece.set, chunk)


def _table(name: str, rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist([{"set": name, **row} for row in rows], schema=READ_SCHEMA)


def summarise(block: pa.Table) -> Summary:
    """The small columns of a block, and the sum of its rows' digests."""
    if block.num_rows == 0:
        return Summary(None, READ_SCHEMA.empty_table().select(SUMMARY), 0)
    names = pc.unique(block["set"]).to_pylist()
    assert len(names) == 1, "a block comes from one piece, and a piece from one set"
    digest = sum(int.from_bytes(row, "big") for row in block["digest"].to_pylist())  # 0 for rows left out
    return Summary(names[0], block.select(SUMMARY), digest)


def number_rows(block: pa.Table, first_row: int, count: int, limit: int) -> tuple[pa.Table, int]:
    """The kept rows of a block in SET_SCHEMA, thinned so that `limit` of the set's `count` remain, evenly spaced; and
    how many of these have no answer.

    `first_row` is the position of the block's first row in the set before thinning.
    """
    kept = block.filter(block["kept"])
    before = [row * limit // count for row in range(first_row, first_row + kept.num_rows + 1)]
    chosen = pa.array([low < high for low, high in pairwise(before)], pa.bool_())
    numbered = kept.append_column("row", pa.array(before[:-1], pa.int64())).filter(chosen)
    rows = numbered.select(SET_SCHEMA.names).cast(SET_SCHEMA)
    return rows, pc.sum(pc.equal(rows["answer"], "")).as_py() or 0


def content_hash(prompt: str, answer: str) -> bytes:
    """16 bytes that are equal where prompt and answer are the same words, whatever their white space and case."""
    words = unicodedata.normalize("NFC", f"{prompt} {answer}").casefold().split()
    return hashlib.blake2b(" ".join(words).encode(), digest_size=16).digest()


def _rows(piece: Piece, columns: ColumnsConfig, selection: Selection) -> Iterator[dict[str, Any]]:
    """Kept rows; and, blank but for id and value, those left out that a deletion request or `values` mentions."""
    wanted = {*columns.model_dump().values(), *([selection.column] if selection.column else [])}
    mentioned = selection.exclude_ids | (selection.ids or frozenset())
    empty_ids: list[str] = []
    values_seen: set[str] = set()
    needs_answer = piece.set != ANSWERED_BY_MODEL
    with open_rows(piece, wanted) as (names, rows):
        if names is None:
            return
        _check_columns(names, columns, selection, needs_answer)
        for number, row in enumerate(rows):
            row_id = _row_id(row, number, columns.id, columns.id in names, piece.id_prefix)
            value = None if selection.column is None else _label(row.get(selection.column), row_id, selection.column)
            matched = value if value is not None and value in selection.values else ""
            if selection.takes(row_id, value):
                texts = _texts(row, row_id, columns, columns.prompt in names, needs_answer)
                if texts is None:
                    empty_ids.append(row_id)
                    if len(empty_ids) == SHOWN:
                        break
                else:
                    yield {**texts, "kept": True, "value": matched, "fault": ""}
            elif row_id in mentioned or (matched and matched not in values_seen):
                yield {**BLANK, "id": row_id, "value": matched}
            values_seen.add(matched)
    if empty_ids:
        questions = f"'{columns.prompt}' and '{columns.answer}'" if needs_answer else f"'{columns.prompt}'"
        filled = questions if columns.prompt in names else f"'{columns.text}'"
        raise SourceError(f"has rows where one is empty of {filled}: {quoted(empty_ids)}; allowed: text in every row")


def _check_columns(names: list[str], columns: ColumnsConfig, selection: Selection, needs_answer: bool) -> None:
    has = f"it has: {', '.join(names)}"
    if columns.prompt not in names and columns.text not in names:
        raise SourceError(f"has neither column '{columns.prompt}' nor '{columns.text}'; {has}")
    if needs_answer and columns.prompt in names and columns.answer not in names:
        raise SourceError(f"has column '{columns.prompt}' but not '{columns.answer}'; {has}")
    if selection.column is not None and selection.column not in names:
        raise SourceError(f"has no column '{selection.column}'; {has}", key="column")


def _row_id(row: dict[str, Any], number: int, column: str, expected: bool, prefix: str) -> str:
    if not expected:
        if column in row:
            raise SourceError(f"row {number} (counted from 0) has '{column}', the first has none; allowed: all or none")
        return f"{prefix}{number}"
    row_id = id_text(row.get(column))
    if row_id is None:
        found = type_name(row.get(column))
        raise SourceError(f"row {number} (counted from 0) has {found} as '{column}'; allowed: text or a whole number")
    return row_id


def _texts(
    row: dict[str, Any], row_id: str, columns: ColumnsConfig, is_question: bool, needs_answer: bool
) -> dict[str, Any] | None:
    """The row in our columns with its hashes; None where its prompt or an answer that it needs is empty."""
    prompt = _text(row.get(columns.prompt), row_id, columns.prompt) if is_question else ""
    answer_column = columns.answer if is_question else columns.text
    answer = _text(row.get(answer_column), row_id, answer_column)
    if not answer.strip():
        answer = ""
    if not (prompt.strip() if is_question else answer) or (needs_answer and not answer):
        return None
    texts = {
        "id": row_id,
        "prompt": prompt,
        "answer": answer,
        "paraphrased_prompt": _text(row.get(columns.paraphrased_prompt), row_id, columns.paraphrased_prompt),
        "paraphrased_answer": _text(row.get(columns.paraphrased_answer), row_id, columns.paraphrased_answer),
        "fact": _fact(row.get(columns.fact), answer, row_id, columns.fact, answer_column),
        "perturbed_answers": _list(row.get(columns.perturbed_answers), row_id, columns.perturbed_answers),
        "label": _label(row.get(columns.label), row_id, columns.label),
    }
    digest = hashlib.sha256(json.dumps(list(texts.values())).encode()).digest()
    return {**texts, "content": content_hash(prompt, answer), "question": content_hash(prompt, ""), "digest": digest}


def _text(value: Any, row_id: str, column: str) -> str:
    """A value as text; '' where there is none."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise SourceError(f"row '{row_id}' has {type_name(value)} in column '{column}'; allowed: text")
    if not is_unicode(value):
        raise SourceError(f"row '{row_id}' has half a surrogate pair in column '{column}'; allowed: Unicode text")
    return value


def _fact(value: Any, answer: str, row_id: str, column: str, answer_column: str) -> str:
    """The words of the answer that carry its fact, without white space around them; '' where there are none."""
    fact = _text(value, row_id, column).strip()
    if fact not in answer:
        raise SourceError(
            f"row '{row_id}' has words in column '{column}' that are not in its '{answer_column}'; "
            "allowed: a part of it, letter for letter"
        )
    return fact


def _label(value: Any, row_id: str, column: str) -> str:
    """A label as text: numbers count, so that 3 in JSON and 3 in CSV are one label."""
    return str(int(value)) if isinstance(value, (bool, int)) else _text(value, row_id, column)


def _list(value: Any, row_id: str, column: str) -> list[str]:
    """A list of texts; CSV, which knows no lists, writes one as JSON."""
    if value is None or value == "":
        return []
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise SourceError(
                f"row '{row_id}' has text in column '{column}'; allowed: a list, or one in JSON"
            ) from None
    if not isinstance(value, list) or None in value:
        found = "a list with a gap" if isinstance(value, list) else type_name(value)
        raise SourceError(f"row '{row_id}' has {found} in column '{column}'; allowed: a list of texts")
    return [_text(item, row_id, column) for item in value]


def type_name(value: Any) -> str:
    """A value's type in words."""
    words = {
        type(None): "nothing",
        bool: "a truth value",
        int: "a number",
        float: "a number",
        str: "empty or broken text",
    }
    return words.get(type(value), f"a {type(value).__name__}")


def quoted(ids: list[str]) -> str:
    """Up to five ids for a message."""
    return ", ".join(f"'{row_id}'" for row_id in ids[:SHOWN])
