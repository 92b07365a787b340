"""Rows of a set, as workers read them: selected, parsed into our columns and hashed.

Every set has the same columns (`SetRow`), whatever its source calls them and however it types
them. A row to classify has a label, and its text as the answer or an image. A fault travels to
the driver as a row of its own (`ReadRow.fault`) and not as an exception, because Ray prints a
task's exception at length, with a message that may quote a row.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute defines its functions when it is imported)

import hashlib
import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypedDict, cast, get_type_hints

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.config.data import ColumnsConfig, Task
from pipelines.data.cells import id_text, label_value, type_name
from pipelines.data.columns import Column, columns_read, wanted_columns
from pipelines.data.conversations import answers_of, asked_otherwise
from pipelines.data.readers import CHUNK_ROWS, Piece, SourceError, open_rows, trace_of

IDS_IN_A_MESSAGE = 5
ROWS_AT_ONCE = 64  # that a process holds as Python objects, which take several times the memory


class SetRow(TypedDict):
    """A row of a set. A column that its source lacks is empty."""

    set: str
    row: int  # position in the set, 0 until the set is numbered
    id: str
    prompt: str  # '' for plain text; turns as `pipelines.data.conversations` writes them
    answer: str  # the last one of a conversation; the text where a source has plain text
    paraphrased_prompt: str
    paraphrased_answer: str
    fact: str  # a part of the answer
    perturbed_answers: list[str]
    refusal: str  # what stands in place of the answer where a loss prefers that
    label: str
    image: bytes  # the content of an image file


class ReadRow(SetRow):
    """A row as a worker has read it, with the columns that the driver checks a set by."""

    selected: (
        bool  # False: not in the set, and listed only because a selector names its id or value
    )
    value: str  # its value in the column that `values` selects by, if it is one of them
    fault: str  # a message for the user, or ''
    trace: str  # traceback of the fault, without messages
    content: bytes  # hash of prompt and answer, up to white space and case, or of the image
    question: bytes  # the same hash without the answer
    digest: bytes  # hash of every column that the source fills


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
OF_ONE_ANSWER = ["paraphrased_prompt", "paraphrased_answer", "fact", "perturbed_answers", "refusal"]
# The columns in a row's digest, besides its refusal and its image. Manifests hold digests, so that
# neither these names nor their order may change.
BESIDE = ("set", "row", "refusal", "image")
DIGEST_OF_CLASSIFIED = ["id", "answer", "label"]
DIGEST_OF_TEXT = [name for name in SET_SCHEMA.names if name not in BESIDE]


@dataclass(frozen=True)
class Selection:
    """The conditions that select rows of a source. A row must meet all of them."""

    ids: frozenset[str] | None  # only these ids
    exclude_ids: frozenset[str]  # none of these ids
    column: str | None  # only rows with one of `values` in this column
    values: frozenset[str]
    share: tuple[float, float] | None = None  # only hashed positions in [first, second) of [0, 1)
    share_seed: int = 0

    def columns(self) -> set[str]:
        """Return the column of the source that `values` selects by, if there is one."""
        return set() if self.column is None else {self.column}

    def value_of(self, cells: dict[str, Any], row_id: str) -> str:
        """Return a row's value in `column` as text, '' without a `column`."""
        if self.column is None:
            return ""
        return label_value(cells.get(self.column), row_id, self.column)

    def accepts(self, row_id: str, value: str) -> bool:
        """Return whether a row's id, and its value in `column`, meet the conditions on them."""
        if row_id in self.exclude_ids or (self.ids is not None and row_id not in self.ids):
            return False
        return self.column is None or value in self.values

    def share_holds(self, content: bytes) -> bool:
        """Return whether `share` includes the rows of this content hash.

        Positions depend on the content alone, so that equal rows of two sets fall on the same
        side, in any order and under any id.
        """
        if self.share is None:
            return True
        first, end = self.share
        salt = self.share_seed.to_bytes(8, "big")
        seeded = hashlib.blake2b(content, digest_size=8, salt=salt).digest()
        # A float holds 53 bits exactly, so that the position is never rounded up to 1.
        position = (int.from_bytes(seeded, "big") >> 11) / 2**53
        return first <= position < end


def read_piece(
    piece: Piece, columns: ColumnsConfig, selection: Selection, task: Task = "causal_lm"
) -> Iterator[pa.Table]:
    """Yield the selected rows of a piece as tables of READ_SCHEMA.

    A fault becomes the last row and ends the reading.
    """
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
    """Yield the selected rows, and some others that the driver needs to check the selectors.

    The others are those that a deletion request names, and the first one of each selected value.
    They are blank except for id and value.
    """
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
            if selection.accepts(row_id, value):
                row = parse_row(cells, row_id, read, task)
                if row is None:
                    empty_ids.append(row_id)
                    if len(empty_ids) == IDS_IN_A_MESSAGE:
                        break
                    continue
            if row is not None and selection.share_holds(row["content"]):
                yield {**row, "set": piece.set, "selected": True, "value": matched}
            elif row_id in mentioned or (matched and matched not in values_seen):
                yield {**BLANK, "set": piece.set, "id": row_id, "value": matched}
            values_seen.add(matched)
    if empty_ids:
        sources = dict.fromkeys(column.source for column in read if column.required)
        filled = " and ".join(f"'{source}'" for source in sources)
        needs = {"causal_lm": "text", "image_classification": "an image and a label"}
        raise SourceError(
            f"has rows where one is empty of {filled}: {quoted(empty_ids)}; "
            f"allowed: {needs.get(task, 'text and a label')} in every row"
        )


def _row_id(cells: dict[str, Any], number: int, column: str, has_column: bool, prefix: str) -> str:
    """Return a row's id, which is its number behind `prefix` where the source has no ids."""
    if not has_column:
        # JSON objects need not have the same keys. Numbering the rows that lack an id would give
        # them ids that no deletion request can know.
        if column in cells:
            raise SourceError(
                f"row {number} (counted from 0) has '{column}', the first has none; "
                "allowed: all or none"
            )
        return f"{prefix}{number}"
    value = cells.get(column)
    row_id = id_text(value)
    if row_id is None:
        found = "empty or broken text" if isinstance(value, str) else type_name(value)
        raise SourceError(
            f"row {number} (counted from 0) has {found} as '{column}'; "
            "allowed: text, a whole or decimal number, a date, a time or a UUID"
        )
    return row_id


def parse_row(
    cells: dict[str, Any], row_id: str, columns: list[Column], task: Task
) -> ReadRow | None:
    """Return a source's row in our columns, with its hashes.

    Returns None where a required column is empty.
    """
    row: dict[str, Any] = {**BLANK, "id": row_id}
    for column in columns:
        value = column.parsed(cells, row_id)
        is_empty = not value or (isinstance(value, str) and value.isspace())
        if is_empty and column.required:
            return None
        if is_empty and column.name == "answer":
            value = ""  # white space alone counts as no answer, which the model then generates
        row[column.name] = value
    sources = {column.name: column.source for column in columns}
    if len(answers_of(row["prompt"], row["answer"])) > 1:
        for name in OF_ONE_ANSWER:
            if row[name]:
                raise SourceError(
                    f"row '{row_id}' has several answers and column '{sources[name]}', which is "
                    "about one; allowed: one answer beside it"
                )
    row["paraphrased_prompt"] = asked_otherwise(row["prompt"], row["paraphrased_prompt"])
    if row["fact"] not in row["answer"]:
        raise SourceError(
            f"row '{row_id}' has words in column '{sources['fact']}' that are not in its "
            f"'{sources['answer']}'; allowed: a part of it, letter for letter"
        )
    digested = DIGEST_OF_TEXT if task == "causal_lm" else DIGEST_OF_CLASSIFIED
    text = json.dumps([row[name] for name in digested]) + row["refusal"]
    row["digest"] = hashlib.sha256(text.encode() + row["image"]).digest()
    if row["image"]:
        row["content"] = hashlib.blake2b(row["image"], digest_size=16).digest()
        row["question"] = row["content"]
    else:
        row["content"] = content_hash(row["prompt"], row["answer"])
        row["question"] = content_hash(row["prompt"], "")
    return cast(ReadRow, row)


def content_hash(prompt: str, answer: str) -> bytes:
    """Return 16 bytes that depend on the words of prompt and answer, not on white space or case."""
    # Unicode can spell "é" as one character or as two. NFC makes both spellings one.
    words = unicodedata.normalize("NFC", f"{prompt} {answer}").casefold().split()
    return hashlib.blake2b(" ".join(words).encode(), digest_size=16).digest()


def number_rows(block: pa.Table, first_row: int, count: int, limit: int) -> tuple[pa.Table, int]:
    """Thin and number the selected rows of a block.

    Args:
        block: a table of READ_SCHEMA.
        first_row: position of the block's first selected row in the set.
        count: number of selected rows in the set.
        limit: number of rows of the set to leave, evenly spaced.

    Returns:
        The rows in SET_SCHEMA, and how many of them have no answer.
    """
    selected = block.filter(block["selected"]).select(SET_SCHEMA.names)
    positions, stays = thinned(first_row, selected.num_rows, count, limit)
    index = SET_SCHEMA.get_field_index("row")
    numbered = selected.set_column(index, "row", positions)
    rows = numbered.filter(stays).cast(SET_SCHEMA)
    has_no_answer = pc.and_(pc.equal(rows["answer"], ""), pc.equal(rows["image"], b""))
    return rows, pc.sum(has_no_answer).as_py() or 0


def thinned(first_row: int, number: int, count: int, limit: int) -> tuple[pa.Array, pa.Array]:
    """Return which of `number` rows of a set stay when it is thinned, evenly, to `limit` rows.

    Args:
        first_row: position of the first of them among the set's `count` rows.

    Returns:
        The position that each row then has, and whether it stays.
    """
    # `left_before[i]` rows are left of all that precede row i. Row i stays where the number rises,
    # and is then the row's position. Integers make this exact for every block on its own.
    rows_before = range(first_row, first_row + number + 1)
    left_before = [row * limit // count for row in rows_before]
    stays = [low < high for low, high in pairwise(left_before)]
    return pa.array(left_before[:-1], pa.int64()), pa.array(stays, pa.bool_())


def each_row(block: pa.Table) -> Iterator[dict[str, Any]]:
    """Yield the rows of a block, of which few at a time are Python objects."""
    for part in block.to_batches(max_chunksize=ROWS_AT_ONCE):
        yield from part.to_pylist()


def quoted(ids: list[str]) -> str:
    """Return the first five ids, quoted for a message."""
    return ", ".join(f"'{row_id}'" for row_id in ids[:IDS_IN_A_MESSAGE])
