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
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.config.data import ColumnsConfig, Task
from pipelines.data.cells import (
    answer_value,
    class_value,
    fact_value,
    image_value,
    label_value,
    list_value,
    text_value,
    type_name,
)
from pipelines.data.sources import CHUNK_ROWS, Piece, SourceError, id_text, open_rows

IDS_IN_A_MESSAGE = 5  # ids that a message names
TEXTS = ("prompt", "answer", "paraphrased_prompt", "paraphrased_answer", "fact")
SET_SCHEMA = pa.schema(
    [("set", pa.string()), ("row", pa.int64()), ("id", pa.string())]
    + [(name, pa.string()) for name in TEXTS]
    + [("perturbed_answers", pa.list_(pa.string())), ("label", pa.string()), ("image", pa.binary())]
)
READ_SCHEMA = pa.schema(
    [field for field in SET_SCHEMA if field.name != "row"]
    + [
        pa.field(
            "kept", pa.bool_()
        ),  # false: a row that is left out, told of only for its id or value
        pa.field("value", pa.string()),  # the selected value of the column that `values` selects by
        pa.field("fault", pa.string()),  # a message for the user, or ''
        pa.field(
            "content", pa.binary(16)
        ),  # equal where prompt and answer are, up to white space and case
        pa.field("question", pa.binary(16)),  # the content of the same row without its answer
        pa.field("digest", pa.binary(32)),  # of the whole row
    ]
)
BLANK = {
    "id": "", **dict.fromkeys(TEXTS, ""), "perturbed_answers": [], "label": "", "image": b"", "kept": False,
    "value": "", "fault": "", "content": bytes(16), "question": bytes(16), "digest": bytes(32),
}  # fmt: skip
SUMMARY = ["id", "kept", "value", "fault", "content", "question"]
# The set whose rows may lack an answer: `pipelines.evaluation.own_answers` gives them one.
ANSWERED_BY_MODEL = "utility"


@dataclass(frozen=True)
class Selection:
    """Which rows of a source are taken: all conditions hold."""

    ids: frozenset[str] | None  # only these
    exclude_ids: frozenset[str]  # none of these
    column: str | None  # only rows with one of `values` in this column
    values: frozenset[str]
    share: tuple[float, float] | None = (
        None  # only rows whose content has its place from the first to below the second
    )
    share_seed: int = 0

    def takes(self, row_id: str, value: str | None) -> bool:
        wanted = self.ids is None or row_id in self.ids
        return (
            wanted
            and row_id not in self.exclude_ids
            and (self.column is None or value in self.values)
        )

    def shares(self, content: bytes) -> bool:
        """Whether rows of this content lie in the share that is taken."""
        if self.share is None:
            return True
        first, end = self.share
        seeded = hashlib.blake2b(
            content, digest_size=8, salt=self.share_seed.to_bytes(8, "big")
        ).digest()
        place = (
            int.from_bytes(seeded, "big") >> 11
        ) / 2**53  # the bits that a float has: never rounded up to 1
        return first <= place < end


class _Form(NamedTuple):
    """How the rows of a source are read."""

    read: Callable[
        [dict[str, Any], str], dict[str, Any] | None
    ]  # with its id; None where what it needs is empty
    needed: str  # the columns that must be filled, for messages
    needs: str  # the same in words


class Summary(NamedTuple):
    """What the driver learns of a block: no text."""

    set: str | None  # None where the block is empty
    rows: pa.Table  # the columns SUMMARY
    digest: int  # of the kept rows; digests of blocks add up


def read_piece(
    piece: Piece, columns: ColumnsConfig, selection: Selection, task: Task = "causal_lm"
) -> Iterator[pa.Table]:
    """The wanted rows of a piece as tables of READ_SCHEMA; a fault becomes the last row and ends the reading."""
    chunk: list[dict[str, Any]] = []
    try:
        for row in _rows(piece, columns, selection, task):
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
    digest = sum(
        int.from_bytes(row, "big") for row in block["digest"].to_pylist()
    )  # 0 for rows left out
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
    is_blank = pc.and_(pc.equal(rows["answer"], ""), pc.equal(rows["image"], b""))
    return rows, pc.sum(is_blank).as_py() or 0


def content_hash(prompt: str, answer: str) -> bytes:
    """16 bytes that are equal where prompt and answer are the same words, whatever their white space and case."""
    words = unicodedata.normalize("NFC", f"{prompt} {answer}").casefold().split()
    return hashlib.blake2b(" ".join(words).encode(), digest_size=16).digest()


def _rows(
    piece: Piece, columns: ColumnsConfig, selection: Selection, task: Task
) -> Iterator[dict[str, Any]]:
    """Kept rows; and, blank but for id and value, those left out that a deletion request or `values` mentions."""
    wanted = _wanted(columns, task) | ({selection.column} if selection.column else set())
    mentioned = selection.exclude_ids | (selection.ids or frozenset())
    empty_ids: list[str] = []
    values_seen: set[str] = set()
    with open_rows(piece, wanted) as (names, rows):
        if names is None:
            return
        form = _form(piece.set, names, columns, task)
        if selection.column is not None and selection.column not in names:
            raise SourceError(
                f"has no column '{selection.column}'; it has: {', '.join(names)}", key="column"
            )
        for number, row in enumerate(rows):
            row_id = _row_id(row, number, columns.id, columns.id in names, piece.id_prefix)
            value = None
            if selection.column is not None:
                value = label_value(row.get(selection.column), row_id, selection.column)
            matched = value if value is not None and value in selection.values else ""
            is_taken = selection.takes(row_id, value)
            found = form.read(row, row_id) if is_taken else BLANK
            if found is None:
                empty_ids.append(row_id)
                if len(empty_ids) == IDS_IN_A_MESSAGE:
                    break
            elif is_taken and selection.shares(found["content"]):
                yield {**found, "kept": True, "value": matched}
            elif row_id in mentioned or (matched and matched not in values_seen):
                yield {**BLANK, "id": row_id, "value": matched}
            values_seen.add(matched)
    if empty_ids:
        raise SourceError(
            f"has rows where one is empty of {form.needed}: {quoted(empty_ids)}; allowed: {form.needs} in every row"
        )


def _wanted(columns: ColumnsConfig, task: Task) -> set[str]:
    """The columns that are read. An image is large, and no other task asks for it."""
    if task == "image_classification":
        return {columns.id, columns.image, columns.label}
    if task == "sequence_classification":
        return {columns.id, columns.text, columns.label}
    named = columns.model_dump(exclude={"image"}).values()
    return {*named, columns.answer.partition(".")[0]}


def _form(set_name: str, names: list[str], columns: ColumnsConfig, task: Task) -> _Form:
    has = f"it has: {', '.join(names)}"
    if task != "causal_lm":
        key = "image" if task == "image_classification" else "text"
        content = str(getattr(columns, key))
        for name, column in ((key, content), ("label", columns.label)):
            if column not in names:
                raise SourceError(f"has no column '{column}' (data.columns.{name}); {has}")
        read = partial(_labelled, columns=columns, is_image=key == "image")
        return _Form(
            read,
            f"'{content}' and '{columns.label}'",
            f"{'an image' if key == 'image' else key} and a label",
        )
    is_question, needs_answer = columns.prompt in names, set_name != ANSWERED_BY_MODEL
    if not is_question and columns.text not in names:
        raise SourceError(f"has neither column '{columns.prompt}' nor '{columns.text}'; {has}")
    if (
        needs_answer
        and is_question
        and not {columns.answer, columns.answer.partition(".")[0]} & set(names)
    ):
        raise SourceError(f"has column '{columns.prompt}' but not '{columns.answer}'; {has}")
    questions = (
        f"'{columns.prompt}' and '{columns.answer}'" if needs_answer else f"'{columns.prompt}'"
    )
    read = partial(_texts, columns=columns, is_question=is_question, needs_answer=needs_answer)
    return _Form(read, questions if is_question else f"'{columns.text}'", "text")


def _row_id(row: dict[str, Any], number: int, column: str, expected: bool, prefix: str) -> str:
    if not expected:
        if column in row:
            raise SourceError(
                f"row {number} (counted from 0) has '{column}', the first has none; allowed: all or none"
            )
        return f"{prefix}{number}"
    row_id = id_text(row.get(column))
    if row_id is None:
        found = (
            "empty or broken text"
            if isinstance(row.get(column), str)
            else type_name(row.get(column))
        )
        raise SourceError(
            f"row {number} (counted from 0) has {found} as '{column}'; allowed: text or a whole number"
        )
    return row_id


def _texts(
    row: dict[str, Any], row_id: str, columns: ColumnsConfig, is_question: bool, needs_answer: bool
) -> dict[str, Any] | None:
    """The row in our columns with its hashes; None where its prompt or an answer that it needs is empty."""
    if is_question:
        prompt = text_value(row.get(columns.prompt), row_id, columns.prompt)
        answer = answer_value(row, row_id, columns.answer)
    else:
        prompt, answer = "", text_value(row.get(columns.text), row_id, columns.text)
    if not answer.strip():
        answer = ""
    if not (prompt.strip() if is_question else answer) or (needs_answer and not answer):
        return None
    texts = {
        "id": row_id,
        "prompt": prompt,
        "answer": answer,
        "paraphrased_prompt": text_value(
            row.get(columns.paraphrased_prompt), row_id, columns.paraphrased_prompt
        ),
        "paraphrased_answer": text_value(
            row.get(columns.paraphrased_answer), row_id, columns.paraphrased_answer
        ),
        "fact": fact_value(
            row.get(columns.fact),
            answer,
            row_id,
            columns.fact,
            columns.answer if is_question else columns.text,
        ),
        "perturbed_answers": list_value(
            row.get(columns.perturbed_answers), row_id, columns.perturbed_answers
        ),
        "label": label_value(row.get(columns.label), row_id, columns.label),
    }
    digest = hashlib.sha256(json.dumps(list(texts.values())).encode()).digest()
    hashes = {
        "content": content_hash(prompt, answer),
        "question": content_hash(prompt, ""),
        "digest": digest,
    }
    return {**BLANK, **texts, **hashes}


def _labelled(
    row: dict[str, Any], row_id: str, columns: ColumnsConfig, is_image: bool
) -> dict[str, Any] | None:
    """The row to classify in our columns with its hashes; None where its text or image, or its label, is empty."""
    image = image_value(row.get(columns.image), row_id, columns.image) if is_image else b""
    text = "" if is_image else text_value(row.get(columns.text), row_id, columns.text)
    label = class_value(row.get(columns.label), row_id, columns.label)
    if not label or not (image or text.strip()):
        return None
    content = (
        hashlib.blake2b(image, digest_size=16).digest() if is_image else content_hash("", text)
    )
    question = content if is_image else content_hash("", "")
    digest = hashlib.sha256(json.dumps([row_id, text, label]).encode() + image).digest()
    own = {"id": row_id, "answer": text, "label": label, "image": image}
    return {**BLANK, **own, "content": content, "question": question, "digest": digest}


def quoted(ids: list[str]) -> str:
    """Up to five ids for a message."""
    return ", ".join(f"'{row_id}'" for row_id in ids[:IDS_IN_A_MESSAGE])
