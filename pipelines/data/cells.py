"""Parsers that turn one cell of a source into the type that the sets have.

The types are text, a label, a list of texts and the bytes of an image. Every parser takes the
value, and the row's id and the column's name for error messages. It raises a `SourceError` for a
value of another type. The message names the row and the column and quotes nothing.
"""

import io
import json
from datetime import date, time
from decimal import Decimal
from typing import Any
from uuid import UUID

from pipelines.data.readers import SourceError

NO_LABEL = "-1"  # how `datasets` writes the label of a row that has none
TYPE_NAMES = {
    type(None): "nothing",
    bool: "a truth value",
    int: "a number",
    float: "a number",
    str: "text",
    bytes: "bytes",
}


def type_name(value: Any) -> str:
    """Return the name of a value's type as error messages say it."""
    return TYPE_NAMES.get(type(value), f"a {type(value).__name__}")


def is_unicode(text: str) -> bool:
    """Return whether the text can be encoded as UTF-8."""
    # JSON can spell half of a surrogate pair ("\ud83d"), which Python reads into a str. Arrow
    # stores text as UTF-8 and would fail later, where the row's id is no longer known.
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def id_text(value: Any) -> str | None:
    """Return an id as text, or None for a value that cannot be an id.

    Numbers are written in digits, UUIDs in small letters, dates and times in ISO 8601. The number
    1 and the text 1 are the same id, as CSV and requests have no numbers. Bytes have no one text,
    and neither have floating-point numbers, which may stand for several whole ones.
    """
    if isinstance(value, str):
        return value if value and is_unicode(value) else None
    if isinstance(value, date | time):  # datetime is a subclass of date
        return value.isoformat()
    if isinstance(value, Decimal):  # databases have whole numbers as decimals, too
        digits = f"{value:f}"  # `normalize` would round to 28 digits
        return digits.rstrip("0").rstrip(".") if "." in digits else digits
    if isinstance(value, int | UUID) and not isinstance(value, bool):
        return str(value)
    return None


def text_value(value: Any, row_id: str, column: str) -> str:
    """Return a value as text, '' for none."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _cell_error(row_id, f"{type_name(value)} in column '{column}'", "text")
    if not is_unicode(value):
        raise _cell_error(row_id, f"half a surrogate pair in column '{column}'", "Unicode text")
    return value


def fact_value(value: Any, row_id: str, column: str) -> str:
    """Return the part of an answer that states its fact, stripped of white space, '' for none."""
    return text_value(value, row_id, column).strip()


def label_value(value: Any, row_id: str, column: str) -> str:
    """Return a label as text. The number 3 in JSON and the text 3 in CSV are the same label."""
    if isinstance(value, int):  # bool is a subclass: true becomes '1'
        return str(int(value))
    return text_value(value, row_id, column)


def class_value(value: Any, row_id: str, column: str) -> str:
    """Return the label of a row to classify, '' for none."""
    label = label_value(value, row_id, column)
    return "" if label == NO_LABEL else label


def list_value(value: Any, row_id: str, column: str) -> list[str]:
    """Return a list of texts, given as a list or as its JSON (CSV has no lists)."""
    if value is None or value == "":
        return []
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            found = f"text in column '{column}'"
            raise _cell_error(row_id, found, "a list, or one in JSON") from None
    if not isinstance(value, list):
        raise _cell_error(row_id, f"{type_name(value)} in column '{column}'", "a list of texts")
    if None in value:
        raise _cell_error(row_id, f"a list with a gap in column '{column}'", "a list of texts")
    return [text_value(item, row_id, column) for item in value]


def answer_value(value: Any, row_id: str, column: str) -> str:
    """Return the answer, which is the first one of a list of answers, '' for none."""
    if isinstance(value, list):
        value = next(iter(value), None)
    return text_value(value, row_id, column)


def image_value(value: Any, row_id: str, column: str) -> bytes:
    """Return the bytes of an image file that PIL can open, b"" for none."""
    from PIL import Image  # imported here because most runs read no images

    allowed = "an image file's bytes (PNG, JPEG, ...)"
    # `datasets` stores an image as a struct of the file's bytes and its path. A path alone would
    # mean a file that the next node may not have.
    if isinstance(value, dict) and "bytes" in value:
        if value["bytes"] is None and value.get("path"):
            found = f"a path alone in column '{column}'"
            raise _cell_error(row_id, found, "the image file's bytes")
        value = value["bytes"]
    if value is None or value == b"":
        return b""
    if not isinstance(value, bytes):
        raise _cell_error(row_id, f"{type_name(value)} in column '{column}'", allowed)
    # Opening reads the header only: the pixels are decoded where the batches are made.
    try:
        Image.open(io.BytesIO(value)).close()
    except Exception:  # PIL raises a type per format, and its messages may quote the file
        found = f"bytes in column '{column}' that PIL cannot open"
        raise _cell_error(row_id, found, allowed) from None
    return value


def _cell_error(row_id: str, found: str, allowed: str) -> SourceError:
    return SourceError(f"row '{row_id}' has {found}; allowed: {allowed}")
