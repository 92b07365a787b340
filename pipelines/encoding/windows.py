"""Rows that are longer than the model is to read at once (`data.max_tokens`): windows, and counts.

Windows cover a row: each of its answer's tokens is counted in exactly one of them, behind as many
of the tokens before it as fit. The forget set is read, and every set is scored, in all windows of
its rows. What is learned or kept is read in the first.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from pipelines.config.data import FORGOTTEN_SETS
from pipelines.data.rows import IDS_IN_A_MESSAGE

# Sets whose rows are read whole: what is or was forgotten, and what it is compared with.
COVERED_SETS = (*FORGOTTEN_SETS, "holdout")
EVALUATED_SETS = ("general", "neighbours")  # no worker trains on them


class Window(NamedTuple):
    """A part of a row that the model reads at once.

    Attributes:
        first: the row's token that the window begins with.
        answer_start: the index, in the window, of the first token that it counts.
    """

    input_ids: list[int]
    answer_start: int
    first: int

    def part_of(self, start: int, end: int) -> tuple[int, int]:
        """Return where the row's tokens [start, end) stand in what the window counts; 0, 0: not."""
        start = max(start - self.first, self.answer_start)
        end = min(end - self.first, len(self.input_ids))
        return (start, end) if start < end else (0, 0)


def windows_of(input_ids: list[int], answer_start: int, most: int) -> list[Window]:
    """Return the windows of at most `most` tokens that cover a row's answer, in its order.

    A long prompt is cut at its left, so that an answer that fits stays in one window. Of a longer
    one, a window behind the first counts half of its tokens, and the last has all the context that
    fits.
    """
    length = len(input_ids)
    if length - answer_start < most:
        first = max(0, length - most)
        return [Window(input_ids[first:], answer_start - first, first)]
    windows: list[Window] = []
    counted = answer_start
    while counted < length:
        end = min(length, max(counted + most // 2, most))
        first = max(0, end - most)
        windows.append(Window(input_ids[first:end], counted - first, first))
        counted = end
    return windows


class RowLength(NamedTuple):
    """The tokens of a row, and the windows that the model reads of it."""

    tokens: int
    windows: int


class Lengths(NamedTuple):
    """How long rows are, of a block or of a whole set.

    Attributes:
        longest_read: the tokens of the longest row, `data.max_tokens` where that is less.
        long_rows: how many rows are longer than `data.max_tokens`.
        long_ids: the first of their ids.
    """

    tokens: int
    windows: int
    longest_read: int
    long_rows: int
    long_ids: list[str]

    def __add__(self, other: "Lengths") -> "Lengths":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Lengths(
            self.tokens + other.tokens,
            self.windows + other.windows,
            max(self.longest_read, other.longest_read),
            self.long_rows + other.long_rows,
            (self.long_ids + other.long_ids)[:IDS_IN_A_MESSAGE],
        )


def lengths_of(ids: Sequence[str], rows: Sequence[RowLength], most: int) -> Lengths:
    """Return the lengths of rows with these ids, of which the model reads `most` tokens at once."""
    long_ids = [name for name, row in zip(ids, rows, strict=True) if row.tokens > most]
    return Lengths(
        tokens=sum(row.tokens for row in rows),
        windows=sum(row.windows for row in rows),
        longest_read=min(most, max((row.tokens for row in rows), default=0)),
        long_rows=len(long_ids),
        long_ids=long_ids[:IDS_IN_A_MESSAGE],
    )


def positions_of(config: Any) -> int | None:
    """Return how many tokens a model has positions for, by its configuration; None: without end.

    Behind them a learned table ends, and rotary positions were never trained.
    """
    text = config.get_text_config()
    if getattr(text, "alibi", False):  # a distance counts there, and no position
        return None
    positions = getattr(text, "max_position_embeddings", None)
    return positions if isinstance(positions, int) else None


def treatment(name: str, lengths: Lengths) -> str:
    """Say what becomes of a set's rows that are longer than the model reads at once."""
    if name in COVERED_SETS:
        return f"read in {lengths.windows:,} windows"
    return "scored in windows" if name in EVALUATED_SETS else "cut in training"
