"""What stands in a source's cell, as the type that the sets have: text, a label, a list of texts, an image's bytes.

What is of another type is a `SourceError` that names the row and the column and quotes nothing.
"""

import io
import json
from typing import Any

from pipelines.data.sources import SourceError, is_unicode

NO_LABEL = "-1"  # how `datasets` writes the label of a row that has none


def text_value(value: Any, row_id: str, column: str) -> str:
    """A value as text; '' where there is none."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise SourceError(
            f"row '{row_id}' has {type_name(value)} in column '{column}'; allowed: text"
        )
    if not is_unicode(value):
        raise SourceError(
            f"row '{row_id}' has half a surrogate pair in column '{column}'; allowed: Unicode text"
        )
    return value


def fact_value(value: Any, answer: str, row_id: str, column: str, answer_column: str) -> str:
    """The words of the answer that carry its fact, without white space around them; '' where there are none."""
    fact = text_value(value, row_id, column).strip()
    if fact not in answer:
        raise SourceError(
            f"row '{row_id}' has words in column '{column}' that are not in its '{answer_column}'; "
            "allowed: a part of it, letter for letter"
        )
    return fact


def label_value(value: Any, row_id: str, column: str) -> str:
    """A label as text: numbers count, so that 3 in JSON and 3 in CSV are one label."""
    return str(int(value)) if isinstance(value, (bool, int)) else text_value(value, row_id, column)


def class_value(value: Any, row_id: str, column: str) -> str:
    """The label of a row to classify; '' where there is none."""
    label = label_value(value, row_id, column)
    return "" if label == NO_LABEL or label.isspace() else label


def list_value(value: Any, row_id: str, column: str) -> list[str]:
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
        raise SourceError(
            f"row '{row_id}' has {found} in column '{column}'; allowed: a list of texts"
        )
    return [text_value(item, row_id, column) for item in value]


def answer_value(row: dict[str, Any], row_id: str, column: str) -> str:
    """The answer, of a list of answers the first; '' where there is none.

    Where no column is called `answers.text`, that is the field `text` of the column `answers`, as SQuAD and ELI5 have.
    """
    outer, _, field = column.partition(".")
    value = row.get(column)
    if column not in row and field and isinstance(row.get(outer), dict):
        value = row[outer].get(field)
    if isinstance(value, list):
        value = value[0] if value else None
    return text_value(value, row_id, column)


def image_value(value: Any, row_id: str, column: str) -> bytes:
    """An image file's bytes, of which PIL knows the beginning; b"" where there is none.

    An Image of `datasets` has them in a struct, beside the file's path.
    """
    from PIL import Image  # late: most sources have none

    if isinstance(value, dict) and "bytes" in value:
        if value["bytes"] is None and value.get("path"):
            raise SourceError(
                f"row '{row_id}' has a path alone in column '{column}'; allowed: the image file's bytes"
            )
        value = value["bytes"]
    if not value and (value is None or isinstance(value, bytes)):
        return b""
    if not isinstance(value, bytes):
        raise SourceError(
            f"row '{row_id}' has {type_name(value)} in column '{column}'; allowed: an image file's bytes"
        )
    try:
        Image.open(io.BytesIO(value)).close()
    except Exception:  # of many types, by format; their texts may quote the file
        raise SourceError(
            f"row '{row_id}' has bytes in column '{column}' that PIL cannot open; allowed: an image file's (PNG, JPEG, "
            "...)"
        ) from None
    return value


def type_name(value: Any) -> str:
    """A value's type in words."""
    words = {
        type(None): "nothing",
        bool: "a truth value",
        int: "a number",
        float: "a number",
        str: "text",
        bytes: "bytes",
    }
    return words.get(type(value), f"a {type(value).__name__}")
