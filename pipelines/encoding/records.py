"""A window of a row as a record of Ray Data, and as the model's row again.

`input_ids` has a window's tokens and, behind them, those of a refusal where the row is of the forget
set. They are one column, because an empty list in every row would make a column of another type.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from rfa.batch import Row

# The columns of numbers. `length` are the window's own tokens.
NUMBERS = {
    "row": np.int64,
    "part": np.int32,
    "label": np.int64,
    "answer_start": np.int32,
    "refusal_start": np.int32,
    "fact_start": np.int32,
    "fact_end": np.int32,
    "length": np.int32,
}


def columns_of(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return records as columns of a batch of Ray Data."""
    columns: dict[str, Any] = {"set": np.asarray([record["set"] for record in records])}
    # Of arrays Ray would make a tensor where all are of one length, a type that blocks of other
    # rows do not have. Lists stay lists.
    columns["input_ids"] = [list(record["input_ids"]) for record in records]
    for name, kind in NUMBERS.items():
        columns[name] = np.asarray([record[name] for record in records], dtype=kind)
    return columns


def row_of(record: Mapping[str, Any]) -> "Row":
    """Return the row of a record, for a batch."""
    from rfa.batch import Row  # imports torch, which a process that only encodes never needs

    length, ids = int(record["length"]), list(record["input_ids"])
    refusal = None
    if len(ids) > length:
        refusal = ids[length:], int(record["refusal_start"])
    return Row(
        ids[:length],
        int(record["answer_start"]),
        int(record["row"]),
        int(record["label"]),
        utility=record["set"] == "utility",
        earlier=record["set"] == "earlier",
        fact=(int(record["fact_start"]), int(record["fact_end"])),
        part=int(record["part"]),
        refusal=refusal,
    )
