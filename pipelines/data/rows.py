"""What a worker makes of a source's rows: the same columns for every set, the wanted rows only, content hashes.

Each row becomes (id, prompt, answer, ...) as text, whatever its source calls them and however it types them; a row to
classify has its text as the answer, or an image, and a label. A fault travels to the driver as a row of its own
(`fault`), not as an exception, because Ray prints exceptions at length.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions when it is imported)

import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, TypedDict, cast, get_type_hints

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.config.data import ColumnsConfig, Task
from pipelines.data.cells import (
    answer_value,
    class_value,
    fact_value,
    id_text,
    image_value,
    label_value,
    list_value,
    text_value,
    type_name,
)
from pipelines.data.readers import CHUNK_ROWS, Piece, SourceError, open_rows, trace_of

IDS_IN_A_MESSAGE = 5  # ids that a message names
# The set whose rows may lack an answer: `pipelines.evaluation.own_answers` gives them one.
ANSWERED_BY_MODEL = "utility"


class SetRow(TypedDict):
    """A row of a set. What its source lacks is empty."""

    set: str
    row: int  # position in the set; 0 until the set is numbered
    id: str
    prompt: str  # '' for plain text
    answer: str  # the text, for plain text
    paraphrased_prompt: str
    paraphrased_answer: str
    fact: str  # a part of the answer
    perturbed_answers: list[str]
    label: str
    image: bytes  # an image file's


class ReadRow(SetRow):
    """A row as a worker has read it, with what the driver asks of it."""

    kept: bool  # False: left out of the set, and here only for its id or value
    value: str  # the selected value of the column that `values` selects by
    fault: str  # a message for the user, or ''
    trace: str  # where the fault was raised, without messages
    content: bytes  # equal where prompt and answer are, up to white space and case
    question: bytes  # the content of the same row without its answer
    digest: bytes  # of all that the source says of the row


ARROW_TYPES: dict[Any, pa.DataType] = {
    str: pa.string(),
    int: pa.int64(),
    bool: pa.bool_(),
    bytes: pa.binary(),
    list[str]: pa.list_(pa.string()),
}
_FIELDS = get_type_hints(ReadRow)
READ_SCHEMA = pa.schema([(name, ARROW_TYPES[kind]) for name, kind in _FIELDS.items()])
SET_SCHEMA = pa.schema([READ_SCHEMA.field(name) for name in get_type_hints(SetRow)])
BLANK = cast(ReadRow, {name: kind() for name, kind in _FIELDS.items()})  # '', 0, False, [] or b''
SUMMARY = ["id", "kept", "value", "fault", "trace", "content", "question"]
# What a row's digest is made of, besides its image: the order is part of the digests that manifests hold.
DIGEST_OF_CLASSIFIED = ["id", "answer", "label"]
DIGEST_OF_TEXT = [name for name in SET_SCHEMA.names if name not in ("set", "row", "image")]


@dataclass(frozen=True)
class Selection:
    """Which rows of a source are taken: all conditions hold."""

    ids: frozenset[str] | None  # only these
    exclude_ids: frozenset[str]  # none of these
    column: str | None  # only rows with one of `values` in this column
    values: frozenset[str]
    share: tuple[float, float] | None = None  # only rows whose position lies in [first, second)
    share_seed: int = 0

    def columns(self) -> set[str]:
        """Return the columns of the source that are selected by: one or none."""
        return set() if self.column is None else {self.column}

    def value_of(self, cells: dict[str, Any], row_id: str) -> str:
        """Return a row's value in `column` as text; '' where nothing selects by a column."""
        if self.column is None:
            return ""
        return label_value(cells.get(self.column), row_id, self.column)

    def takes(self, row_id: str, value: str) -> bool:
        """Whether a row's id and its value in `column` are among the wanted."""
        if row_id in self.exclude_ids or (self.ids is not None and row_id not in self.ids):
            return False
        return self.column is None or value in self.values

    def shares(self, content: bytes) -> bool:
        """Whether rows of this content lie in the share that is taken."""
        if self.share is None:
            return True
        first, end = self.share
        salt = self.share_seed.to_bytes(8, "big")
        seeded = hashlib.blake2b(content, digest_size=8, salt=salt).digest()
        # The 53 bits that a float has: never rounded up to 1.
        position = (int.from_bytes(seeded, "big") >> 11) / 2**53
        return first <= position < end


class Column(NamedTuple):
    """One of our columns: where the source has it, how a cell is parsed, and whether every row must fill it."""

    name: str
    source: str
    parse: Callable[[Any, str, str], Any]
    required: bool = False


class Summary(NamedTuple):
    """What the driver learns of a block: no text."""

    set: str | None  # None where the block is empty
    rows: pa.Table  # the columns SUMMARY
    digest: int  # of the kept rows; digests of blocks add up


def columns_read(
    set_name: str, names: list[str], columns: ColumnsConfig, task: Task
) -> list[Column]:
    """Return the columns that a source's rows have for the task, those that must be filled first.

    Raises:
        SourceError: the source, whose columns are `names`, lacks one that is needed.
    """
    has = f"it has: {', '.join(names)}"
    label = Column("label", columns.label, class_value, required=True)
    if task == "image_classification":
        return _present([Column("image", columns.image, image_value, required=True), label], names)
    if task == "sequence_classification":
        return _present([Column("answer", columns.text, text_value, required=True), label], names)
    optional = [
        Column("paraphrased_prompt", columns.paraphrased_prompt, text_value),
        Column("paraphrased_answer", columns.paraphrased_answer, text_value),
        Column("fact", columns.fact, fact_value),
        Column("perturbed_answers", columns.perturbed_answers, list_value),
        Column("label", columns.label, label_value),
    ]
    if columns.prompt not in names:
        if columns.text not in names:
            raise SourceError(f"has neither column '{columns.prompt}' nor '{columns.text}'; {has}")
        return [Column("answer", columns.text, text_value, required=True), *optional]
    needs_answer = set_name != ANSWERED_BY_MODEL
    if needs_answer and not {columns.answer, _outer(columns.answer)} & set(names):
        raise SourceError(f"has column '{columns.prompt}' but not '{columns.answer}'; {has}")
    prompt = Column("prompt", columns.prompt, text_value, required=True)
    return [prompt, Column("answer", columns.answer, answer_value, needs_answer), *optional]


def _present(needed: list[Column], names: list[str]) -> list[Column]:
    for column in needed:
        if column.source not in names:
            key = "text" if column.name == "answer" else column.name
            raise SourceError(
                f"has no column '{column.source}' (data.columns.{key}); it has: {', '.join(names)}"
            )
    return needed


def _outer(column: str) -> str:
    """Return the column that `answers.text` is a field of."""
    return column.partition(".")[0]


def wanted_columns(columns: ColumnsConfig, task: Task) -> set[str]:
    """Return the columns of a source that are read. An image is large, and no other task asks for it."""
    if task == "image_classification":
        return {columns.id, columns.image, columns.label}
    if task == "sequence_classification":
        return {columns.id, columns.text, columns.label}
    named = columns.model_dump(exclude={"image"}).values()
    return {*named, *map(_outer, named)}


def read_piece(
    piece: Piece, columns: ColumnsConfig, selection: Selection, task: Task = "causal_lm"
) -> Iterator[pa.Table]:
    """Yield the wanted rows of a piece as tables of READ_SCHEMA; a fault becomes the last row and ends the reading."""
    chunk: list[ReadRow] = []
    try:
        for row in _rows(piece, columns, selection, task):
            chunk.append(row)
            if len(chunk) == CHUNK_ROWS:
                yield pa.Table.from_pylist(chunk, schema=READ_SCHEMA)
                chunk = []
    except SourceError as fault:
        separator = ": " if fault.text.startswith(("line ", "row", "item ")) else " "
        message = f"data.{piece.set}.{fault.key}: {piece.shown}{separator}{fault.text}"
        chunk = [{**BLANK, "set": piece.set, "fault": message, "trace": trace_of(fault)}]
    yield pa.Table.from_pylist(chunk, schema=READ_SCHEMA)


def _rows(
    piece: Piece, columns: ColumnsConfig, selection: Selection, task: Task
) -> Iterator[ReadRow]:
    """Yield kept rows; and, blank but for id and value, those left out that a deletion request or `values` mentions."""
    wanted = wanted_columns(columns, task) | selection.columns()
    mentioned = selection.exclude_ids | (selection.ids or frozenset())
    empty_ids: list[str] = []
    values_seen: set[str] = set()
    with open_rows(piece, wanted) as (names, source_rows):
        if names is None:
            return
        read = columns_read(piece.set, names, columns, task)
        for column in selection.columns() - set(names):
            raise SourceError(f"has no column '{column}'; it has: {', '.join(names)}", key="column")
        for number, cells in enumerate(source_rows):
            row_id = _row_id(cells, number, columns.id, columns.id in names, piece.id_prefix)
            value = selection.value_of(cells, row_id)
            matched = value if value in selection.values else ""
            row: ReadRow | None = None
            if selection.takes(row_id, value):
                row = parse_row(cells, row_id, read, task)
                if row is None:
                    empty_ids.append(row_id)
                    if len(empty_ids) == IDS_IN_A_MESSAGE:
                        break
                    continue
            if row is not None and selection.shares(row["content"]):
                yield {**row, "set": piece.set, "kept": True, "value": matched}
            elif row_id in mentioned or (matched and matched not in values_seen):
                yield {**BLANK, "set": piece.set, "id": row_id, "value": matched}
            values_seen.add(matched)
    if empty_ids:
        filled = " and ".join(f"'{column.source}'" for column in read if column.required)
        needs = {"causal_lm": "text", "image_classification": "an image and a label"}
        raise SourceError(
            f"has rows where one is empty of {filled}: {quoted(empty_ids)}; "
            f"allowed: {needs.get(task, 'text and a label')} in every row"
        )


def _row_id(cells: dict[str, Any], number: int, column: str, expected: bool, prefix: str) -> str:
    if not expected:
        if column in cells:
            raise SourceError(
                f"row {number} (counted from 0) has '{column}', the first has none; allowed: all or none"
            )
        return f"{prefix}{number}"
    value = cells.get(column)
    row_id = id_text(value)
    if row_id is None:
        found = "empty or broken text" if isinstance(value, str) else type_name(value)
        raise SourceError(
            f"row {number} (counted from 0) has {found} as '{column}'; "
            "allowed: text, a whole number, a date or a UUID"
        )
    return row_id


def parse_row(
    cells: dict[str, Any], row_id: str, columns: list[Column], task: Task
) -> ReadRow | None:
    """Return a source's row in our columns with its hashes; None where a column that it must fill is empty."""
    row: dict[str, Any] = {**BLANK, "id": row_id}
    for column in columns:
        parsed = column.parse(_cell(cells, column.source), row_id, column.source)
        is_empty = not parsed or (isinstance(parsed, str) and parsed.isspace())
        if is_empty and column.required:
            return None
        if is_empty and column.name == "answer":
            parsed = ""
        row[column.name] = parsed
    if row["fact"] not in row["answer"]:
        sources = {column.name: column.source for column in columns}
        raise SourceError(
            f"row '{row_id}' has words in column '{sources['fact']}' that are not in its "
            f"'{sources['answer']}'; allowed: a part of it, letter for letter"
        )
    digested = DIGEST_OF_TEXT if task == "causal_lm" else DIGEST_OF_CLASSIFIED
    text = json.dumps([row[name] for name in digested])
    row["digest"] = hashlib.sha256(text.encode() + row["image"]).digest()
    if row["image"]:
        row["content"] = hashlib.blake2b(row["image"], digest_size=16).digest()
        row["question"] = row["content"]
    else:
        row["content"] = content_hash(row["prompt"], row["answer"])
        row["question"] = content_hash(row["prompt"], "")
    return cast(ReadRow, row)


def _cell(cells: dict[str, Any], column: str) -> Any:
    """Return a cell. Where no column is called `answers.text`, that is the field `text` of the column `answers`, as
    SQuAD and ELI5 have it."""
    outer, _, field = column.partition(".")
    if column not in cells and field and isinstance(cells.get(outer), dict):
        return cells[outer].get(field)
    return cells.get(column)


def content_hash(prompt: str, answer: str) -> bytes:
    """Return 16 bytes that are equal where prompt and answer are the same words, in any white space and case."""
    words = unicodedata.normalize("NFC", f"{prompt} {answer}").casefold().split()
    return hashlib.blake2b(" ".join(words).encode(), digest_size=16).digest()


def summarise(block: pa.Table) -> Summary:
    """Return the small columns of a block, and the sum of its rows' digests."""
    rows = block.select(SUMMARY)
    if block.num_rows == 0:
        return Summary(None, rows, 0)
    names = pc.unique(block["set"]).to_pylist()
    assert len(names) == 1, "a block comes from one piece, and a piece from one set"
    digests = block["digest"].to_pylist()  # b'', which counts as 0, for rows left out
    return Summary(names[0], rows, sum(int.from_bytes(digest, "big") for digest in digests))


def number_rows(block: pa.Table, first_row: int, count: int, limit: int) -> tuple[pa.Table, int]:
    """Return the kept rows of a block in SET_SCHEMA, and how many of them have no answer.

    The rows are thinned so that `limit` of the set's `count` remain, evenly spaced. `first_row` is the position of the
    block's first row in the set before thinning.
    """
    kept = block.filter(block["kept"]).select(SET_SCHEMA.names)
    before = [row * limit // count for row in range(first_row, first_row + kept.num_rows + 1)]
    is_taken = pa.array([low < high for low, high in pairwise(before)], pa.bool_())
    index = SET_SCHEMA.get_field_index("row")
    numbered = kept.set_column(index, "row", pa.array(before[:-1], pa.int64()))
    rows = numbered.filter(is_taken).cast(SET_SCHEMA)
    is_blank = pc.and_(pc.equal(rows["answer"], ""), pc.equal(rows["image"], b""))
    return rows, pc.sum(is_blank).as_py() or 0


def quoted(ids: list[str]) -> str:
    """Return up to five ids for a message."""
    return ", ".join(f"'{row_id}'" for row_id in ids[:IDS_IN_A_MESSAGE])
