"""What stands in a source's cell, as the type that the sets have: text, a label, a list of texts, an image's bytes.

A parser takes the value, the row's id and the column, both for messages. A value of another type is a `SourceError`
that names the row and the column and quotes nothing.
"""

import io
import json
from datetime import date
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
    """Return a value's type in words."""
    return TYPE_NAMES.get(type(value), f"a {type(value).__name__}")


def is_unicode(text: str) -> bool:
    """Whether the text can be stored: JSON may spell half of a surrogate pair, which no encoding has."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def id_text(value: Any) -> str | None:
    """Return an id as text; None where the value cannot be one. Dates and times are written as ISO 8601 has them."""
    if isinstance(value, str):
        return value if value and is_unicode(value) else None
    if isinstance(value, date):  # a datetime is one, too
        return value.isoformat()
    if isinstance(value, int | UUID) and not isinstance(value, bool):
        return str(value)
    return None


def text_value(value: Any, row_id: str, column: str) -> str:
    """Return a value as text; '' where there is none."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _fault(row_id, f"{type_name(value)} in column '{column}'", "text")
    if not is_unicode(value):
        raise _fault(row_id, f"half a surrogate pair in column '{column}'", "Unicode text")
    return value


def fact_value(value: Any, row_id: str, column: str) -> str:
    """Return the words of an answer that carry its fact, without white space around them; '' where there are none."""
    return text_value(value, row_id, column).strip()


def label_value(value: Any, row_id: str, column: str) -> str:
    """Return a label as text: numbers count, so that 3 in JSON and 3 in CSV are one label."""
    if isinstance(value, int):  # a truth value is one, too
        return str(int(value))
    return text_value(value, row_id, column)


def class_value(value: Any, row_id: str, column: str) -> str:
    """Return the label of a row to classify; '' where there is none."""
    label = label_value(value, row_id, column)
    return "" if label == NO_LABEL else label


def list_value(value: Any, row_id: str, column: str) -> list[str]:
    """Return a list of texts; CSV, which knows no lists, writes one as JSON."""
    if value is None or value == "":
        return []
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise _fault(row_id, f"text in column '{column}'", "a list, or one in JSON") from None
    if not isinstance(value, list):
        raise _fault(row_id, f"{type_name(value)} in column '{column}'", "a list of texts")
    if None in value:
        raise _fault(row_id, f"a list with a gap in column '{column}'", "a list of texts")
    return [text_value(item, row_id, column) for item in value]


def answer_value(value: Any, row_id: str, column: str) -> str:
    """Return the answer, of a list of answers the first; '' where there is none."""
    if isinstance(value, list):
        value = next(iter(value), None)
    return text_value(value, row_id, column)


def image_value(value: Any, row_id: str, column: str) -> bytes:
    """Return an image file's bytes, of which PIL knows the beginning; b"" where there is none.

    An Image of `datasets` has them in a struct, beside the file's path.
    """
    from PIL import Image  # late: most sources have none

    allowed = "an image file's bytes (PNG, JPEG, ...)"
    if isinstance(value, dict) and "bytes" in value:
        if value["bytes"] is None and value.get("path"):
            found = f"a path alone in column '{column}'"
            raise _fault(row_id, found, "the image file's bytes")
        value = value["bytes"]
    if value is None or value == b"":
        return b""
    if not isinstance(value, bytes):
        raise _fault(row_id, f"{type_name(value)} in column '{column}'", allowed)
    try:
        Image.open(io.BytesIO(value)).close()
    except Exception:  # of many types, by format; their texts may quote the file
        found = f"bytes in column '{column}' that PIL cannot open"
        raise _fault(row_id, found, allowed) from None
    return value


def _fault(row_id: str, found: str, allowed: str) -> SourceError:
    return SourceError(f"row '{row_id}' has {found}; allowed: {allowed}")
