"""What the driver checks a set by: counts and ids of a block, and keys that stay where they are.

The keys of a row are its id and its hashes. They lie in Ray's object store beside the rows, and
tasks compare them, so that the driver's memory grows with a set's files and not with its rows.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute defines its functions when it is imported)

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import ray

from pipelines.cluster.tasks import all_results
from pipelines.data.rows import IDS_IN_A_MESSAGE

KEYS = ["id", "content", "question"]
IDS_AT_ONCE = 2**20  # ids that one task compares with each other


class Summary(NamedTuple):
    """What the driver learns of a block. It holds no text, and nothing that every row has."""

    set: str | None  # None where the block is empty
    selected: int  # rows that are in the set
    digest: int  # sum of the selected rows' digests
    fault: str  # a message for the user, or ''
    trace: str
    values: list[str]  # those of the selector's values that a row has
    named: list[str]  # ids of deletion requests that a row has


class Found(NamedTuple):
    """How many rows or ids a check has found, and the first of their ids."""

    number: int
    ids: list[str]


def summarise(block: pa.Table, requests: Mapping[str, pa.Array]) -> tuple[Summary, pa.Table]:
    """Return the summary of a block, and the keys of its selected rows.

    `requests` has the ids that a set's deletion requests name, by set.
    """
    selected = block.filter(block["selected"])
    keys = selected.select(KEYS)
    if block.num_rows == 0:
        return Summary(None, 0, 0, "", "", [], []), keys
    names = pc.unique(block["set"]).to_pylist()
    assert len(names) == 1, "a block comes from one piece, and a piece from one set"
    # A sum does not depend on the order of rows and blocks, and unlike XOR it counts a row that
    # comes twice.
    digest = sum(int.from_bytes(digest, "big") for digest in selected["digest"].to_pylist())
    faulty = block.filter(pc.not_equal(block["fault"], ""))
    named = block["id"].filter(pc.is_in(block["id"], value_set=requests[names[0]]))
    summary = Summary(
        names[0],
        selected.num_rows,
        digest,
        faulty["fault"][0].as_py() if faulty.num_rows else "",
        faulty["trace"][0].as_py() if faulty.num_rows else "",
        pc.unique(block["value"]).to_pylist(),
        pc.unique(named).to_pylist(),
    )
    return summary, keys


def repeated_ids(keys: Sequence[Any], count: int) -> Found:
    """Return the ids that more than one row of a set has.

    Args:
        keys: references to the keys of the set's blocks.
        count: rows of the set.
    """
    parts = -(-count // IDS_AT_ONCE)
    # Equal ids meet in one part, wherever they lie.
    columns: list[Any] = [[block] for block in keys]
    if parts > 1:
        columns = [_in_parts.options(num_returns=parts).remote(block, parts) for block in keys]
    tasks = [_repeated.remote(*of_part) for of_part in zip(*columns, strict=True)]
    found = all_results(tasks)
    ids = [row_id for of_part in found for row_id in of_part.ids]
    return Found(sum(of_part.number for of_part in found), ids[:IDS_IN_A_MESSAGE])


def shared_rows(keys: Sequence[Any], others: Sequence[Any]) -> Found:
    """Return the rows of a set that another set has as well.

    A row stands there if its content does: prompt and answer, or the text or image to classify. A
    row of the other set that has a prompt alone matches by its prompt, because the model's own
    answer will complete it, and that answer would be the one to forget.

    Args:
        keys: references to the keys of the set's blocks. One task holds all of them.
        others: those of the other set.
    """
    whole = _joined.remote(*keys)
    rows: set[int] = set()
    for of_block in all_results([_shared.remote(whole, other) for other in others]):
        rows.update(of_block)
    if not rows:
        return Found(0, [])
    return Found(
        len(rows), all_results([_ids_at.remote(whole, sorted(rows)[:IDS_IN_A_MESSAGE])])[0]
    )


def ids_in_order(keys: Sequence[Any]) -> list[str]:
    """Return the ids of a set's rows."""
    return all_results([_all_ids.remote(*keys)])[0]


# "DEFAULT" keeps these tasks out of a Tune trial's placement group, whose resources belong to its
# workers. A task there would wait for resources that they hold.
@ray.remote(scheduling_strategy="DEFAULT")
def _in_parts(keys: pa.Table, parts: int) -> list[pa.Table]:
    import pandas

    hashes: Any = pandas.util
    part_N = hashes.hash_array(keys["id"].to_numpy()) % parts
    return [keys.select(["id"]).filter(pa.array(part_N == part)) for part in range(parts)]


@ray.remote(scheduling_strategy="DEFAULT")
def _repeated(*keys: pa.Table) -> Found:
    counts = pc.value_counts(pa.concat_tables(block.select(["id"]) for block in keys)["id"])
    is_repeated = pc.greater(counts.field("counts"), 1)
    ids = counts.field("values").filter(is_repeated)
    return Found(len(ids), ids[:IDS_IN_A_MESSAGE].to_pylist())


@ray.remote(scheduling_strategy="DEFAULT")
def _joined(*keys: pa.Table) -> pa.Table:
    return pa.concat_tables(keys)


@ray.remote(scheduling_strategy="DEFAULT")
def _shared(keys: pa.Table, other: pa.Table) -> list[int]:
    """Return the positions of the rows whose content another set's block has."""
    has_prompt_only = pc.equal(other["content"], other["question"])
    prompts = other["question"].filter(has_prompt_only).combine_chunks()
    same_row = pc.is_in(keys["content"], value_set=other["content"].combine_chunks())
    same_prompt = pc.is_in(keys["question"], value_set=prompts)
    return pc.indices_nonzero(pc.or_(same_row, same_prompt)).to_pylist()


@ray.remote(scheduling_strategy="DEFAULT")
def _ids_at(keys: pa.Table, rows: list[int]) -> list[str]:
    return keys["id"].take(rows).to_pylist()


@ray.remote(scheduling_strategy="DEFAULT")
def _all_ids(*keys: pa.Table) -> list[str]:
    return pa.concat_tables(keys)["id"].to_pylist()
