"""SetReader: one set between its source and its Dataset, with the checks of its ids and rows.

The checks run on the driver and see ids and hashes only. The rows stay in Ray's object store.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute defines its functions when it is imported)

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.config.data import SetName, SourceConfig
from pipelines.config.schema import ConfigError
from pipelines.data.rows import Selection, Summary, quoted, thinned
from pipelines.data.sources import find_pieces, request_ids


class SetReader:
    """One set on its way from its source to a Dataset.

    Raises:
        ConfigError: its source or a deletion request cannot be found.
    """

    def __init__(self, name: SetName, source: SourceConfig, share_seed: int) -> None:
        self.name = name
        self.source = source
        self.requests: dict[str, list[str]] = {}  # ids of each deletion request, by its key
        for key, path in (("ids", source.ids), ("exclude_ids", source.exclude_ids)):
            if path is not None:
                self.requests[key] = request_ids(path, f"data.{name}.{key}")
        self.pieces = find_pieces(name, source)
        self.selection = Selection(
            ids=frozenset(self.requests["ids"]) if source.ids else None,
            exclude_ids=frozenset(self.requests.get("exclude_ids", ())),
            column=source.column,
            values=frozenset(map(str, source.values)),
            share=source.share,
            share_seed=share_seed,
        )
        self.blocks: list[Any] = []  # references to the blocks that hold selected rows
        self.first_rows: list[int] = []  # position in the set of each block's first selected row
        self.rows: pa.Table = pa.table({})  # the columns SUMMARY of every row that was read
        self.selected: pa.Table = pa.table({})  # those of the selected rows
        self.digest = 0

    @property
    def size(self) -> int:
        """Return the number of rows after `max_rows`."""
        return min(self.selected.num_rows, self.source.max_rows or self.selected.num_rows)

    def ids(self) -> list[str]:
        """Return the ids of the set's rows after `max_rows`, in their order."""
        count = self.selected.num_rows
        _, stays = thinned(0, count, count, self.size)
        return self.selected["id"].filter(stays).to_pylist()

    def add_blocks(self, blocks: list[Any], summaries: list[Summary]) -> None:
        """Collect this set's blocks among those of all sets.

        The order of the blocks is that of the rows, so positions follow from counts alone.
        """
        tables = [summaries[0].rows.slice(0, 0)]  # gives a set without blocks its columns
        first_row = 0
        for block, summary in zip(blocks, summaries, strict=True):
            if summary.set != self.name:
                continue
            tables.append(summary.rows)
            self.digest += summary.digest
            num_selected = pc.sum(summary.rows["selected"]).as_py() or 0
            if num_selected:
                self.blocks.append(block)
                self.first_rows.append(first_row)
            first_row += num_selected
        self.rows = pa.concat_tables(tables)
        self.selected = self.rows.filter(self.rows["selected"])

    def check(self) -> None:
        """Check the rows and the selectors of the set.

        Raises:
            ConfigError: a row has a fault, the set is empty, an id comes twice, or a selector
                names an id or value that the source does not have.
        """
        where, path = f"data.{self.name}", self.source.path
        # A fault ends the reading of its piece, so that everything else would follow from it.
        faults = self.rows.filter(pc.not_equal(self.rows["fault"], ""))
        if faults.num_rows:
            error = ConfigError(faults["fault"][0].as_py())
            trace = faults["trace"][0].as_py()
            if trace:  # shown by `--debug`
                error.add_note(f"On the worker, without messages:\n{trace}")
            raise error
        for key, ids in self.requests.items():
            missing = _ids_not_in(self.rows, ids)
            if missing:
                raise ConfigError(
                    f"{where}.{key}: {getattr(self.source, key)} names "
                    f"{_counted(len(missing), 'id')} that {path} does not have: "
                    f"{quoted(missing)}; allowed: ids of its rows"
                )
        present_values = set(pc.unique(self.rows["value"]).to_pylist())
        values = map(str, self.source.values)
        missing_values = [value for value in values if value not in present_values]
        if missing_values:
            raise ConfigError(
                f"{where}.values: {path} has no row whose '{self.source.column}' is "
                f"{quoted(missing_values)}; allowed: values of that column"
            )
        if not self.selected.num_rows:
            fault = "has no rows"
            if self.requests or self.source.column is not None or self.source.share is not None:
                fault = "no row is left after ids, exclude_ids, column and share"
            raise ConfigError(f"{where}.path: {path}: {fault}; allowed: at least one row")
        counts = pc.value_counts(self.selected["id"])
        is_repeated = pc.greater(counts.field("counts"), 1)
        repeated = counts.field("values").filter(is_repeated).to_pylist()
        if repeated:
            raise ConfigError(
                f"{where}.path: {path} has {_counted(len(repeated), 'id')} more than once: "
                f"{quoted(repeated)}; allowed: a row an id"
            )

    def check_disjoint(self, other: "SetReader", key_text: str) -> None:
        """Refuse rows that also stand in another set.

        A row stands there if its content does: prompt and answer, or the text or image to
        classify (`key_text` says which, for the message). A row of the other set that has a
        prompt alone matches by its prompt, because the model's own answer will complete it, and
        that answer would be the one to forget.

        Raises:
            ConfigError: the sets share rows.
        """
        has_prompt_only = pc.equal(other.selected["content"], other.selected["question"])
        prompts = other.selected["question"].filter(has_prompt_only).combine_chunks()
        contents = other.selected["content"].combine_chunks()
        same_row = pc.is_in(self.selected["content"], value_set=contents)
        same_prompt = pc.is_in(self.selected["question"], value_set=prompts)
        shared = self.selected["id"].filter(pc.or_(same_row, same_prompt)).to_pylist()
        if shared:
            raise ConfigError(
                f"data.{self.name}.path: {self.source.path} shares "
                f"{_counted(len(shared), 'row')} with {other.name} ({other.source.path}), by "
                f"{key_text}: ids {quoted(shared)}; allowed: {self.name} rows that "
                f"{other.name} does not have"
            )


def _ids_not_in(rows: pa.Table, ids: list[str]) -> list[str]:
    wanted = pa.array(ids, pa.string())
    is_present = pc.is_in(wanted, value_set=rows["id"].combine_chunks())
    return wanted.filter(pc.invert(is_present)).to_pylist()


def _counted(count: int, noun: str) -> str:
    """Return a count with its noun in the singular or plural."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
