"""Columns: which ones a source needs for a task, and how each becomes a column of `SetRow`."""

from collections.abc import Callable
from typing import Any, NamedTuple

from pipelines.config.data import ColumnsConfig, Task
from pipelines.data.cells import (
    answer_value,
    class_value,
    fact_value,
    image_value,
    label_value,
    list_value,
    text_value,
)
from pipelines.data.conversations import (
    conversation_answer,
    conversation_prompt,
    plain_prompt,
    required_answer,
)
from pipelines.data.readers import SourceError

# The columns of conversations, where `data.columns.messages` names none: OpenAI's and ShareGPT's.
CONVERSATIONS = ("messages", "conversations")
# The set whose rows may lack an answer. `pipelines.evaluation.own_answers` generates it.
ANSWERED_BY_MODEL = "utility"


class Column(NamedTuple):
    """One of our columns, and how it is read from a source."""

    name: str
    source: str  # the source's column
    parse: Callable[[Any, str, str], Any]  # of (cell, row id, source's column)
    required: bool = False  # whether every row must fill it

    def parsed(self, cells: dict[str, Any], row_id: str) -> Any:
        """Return a row's value in this column.

        A source's column may be a field of another one: SQuAD and ELI5 have `answers.text`. A
        column whose name has the dot itself goes first.
        """
        cell = cells.get(self.source)
        outer, _, field = self.source.partition(".")
        if self.source not in cells and field and isinstance(cells.get(outer), dict):
            cell = cells[outer].get(field)
        return self.parse(cell, row_id, self.source)


def columns_read(
    set_name: str, names: list[str], columns: ColumnsConfig, task: Task
) -> list[Column]:
    """Return the columns to read for a task from a source that has the columns `names`.

    Required columns come first.

    Raises:
        SourceError: the source lacks a required column.
    """
    has = f"it has: {', '.join(names)}"
    label = Column("label", columns.label, class_value, required=True)
    if task == "image_classification":
        return _present([Column("image", columns.image, image_value, required=True), label], names)
    if task == "sequence_classification":
        return _present([Column("answer", columns.text, text_value, required=True), label], names)
    optional = [
        Column("paraphrased_prompt", columns.paraphrased_prompt, plain_prompt),
        Column("paraphrased_answer", columns.paraphrased_answer, text_value),
        Column("fact", columns.fact, fact_value),
        Column("perturbed_answers", columns.perturbed_answers, list_value),
        Column("refusal", columns.refusal, text_value),
        Column("label", columns.label, label_value),
    ]
    needs_answer = set_name != ANSWERED_BY_MODEL
    has_answer = bool({columns.answer, _outer(columns.answer)} & set(names))
    is_pair = columns.prompt in names and has_answer
    is_text = columns.prompt not in names and columns.text in names
    messages = _conversation_column(columns, names, reads_others=is_pair or is_text)
    if messages is not None:
        parse = required_answer if needs_answer else conversation_answer
        prompt = Column("prompt", messages, conversation_prompt, required=True)
        return [prompt, Column("answer", messages, parse, needs_answer), *optional]
    if columns.prompt not in names:
        if columns.text not in names:
            sought = f"'{columns.prompt}', '{columns.messages or CONVERSATIONS[0]}'"
            raise SourceError(f"has none of the columns {sought} and '{columns.text}'; {has}")
        return [Column("answer", columns.text, text_value, required=True), *optional]
    if needs_answer and not has_answer:
        raise SourceError(f"has column '{columns.prompt}' but not '{columns.answer}'; {has}")
    prompt = Column("prompt", columns.prompt, plain_prompt, required=True)
    return [prompt, Column("answer", columns.answer, answer_value, needs_answer), *optional]


def _conversation_column(
    columns: ColumnsConfig, names: list[str], *, reads_others: bool
) -> str | None:
    """Return the source's column of conversations to read, or None where it has none.

    One that the configuration names goes before prompt and answer or text (`reads_others`), which
    go before one that has the usual name.
    """
    if columns.messages is not None:
        return columns.messages if columns.messages in names else None
    if reads_others:
        return None
    return next((name for name in CONVERSATIONS if name in names), None)


def _present(needed: list[Column], names: list[str]) -> list[Column]:
    for column in needed:
        if column.source not in names:
            key = "text" if column.name == "answer" else column.name
            raise SourceError(
                f"has no column '{column.source}' (data.columns.{key}); it has: {', '.join(names)}"
            )
    return needed


def _outer(column: str) -> str:
    """Return the source's column that a name like `answers.text` is a field of."""
    return column.partition(".")[0]


def wanted_columns(columns: ColumnsConfig, task: Task) -> set[str]:
    """Return the columns of a source to decode for a task.

    Only image classification reads images, because they are large.
    """
    if task == "image_classification":
        return {columns.id, columns.image, columns.label}
    if task == "sequence_classification":
        return {columns.id, columns.text, columns.label}
    named = columns.model_dump(exclude={"image"}, exclude_none=True).values()
    names = {*named, *map(_outer, named)}
    return names if columns.messages is not None else {*names, *CONVERSATIONS}
