"""SetReader: one set between its source and its Dataset, with the checks of its ids and rows.

The checks run on the driver, which sees counts alone and the ids of deletion requests. The rows and
their keys stay in Ray's object store.
"""

from itertools import compress
from typing import Any

import pyarrow as pa

from pipelines.config.data import SetName, SourceConfig
from pipelines.config.schema import ConfigError
from pipelines.data.keys import Summary, ids_in_order, repeated_ids, shared_rows
from pipelines.data.rows import Selection, quoted, thinned
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
        self.keys: list[Any] = []  # and to the keys of those rows
        self.first_rows: list[int] = []  # position in the set of each block's first selected row
        self.selected = 0  # rows
        self.digest = 0
        self.fault, self.trace = "", ""  # the first ones
        # What the selector and the deletion requests name, and the source has.
        self.values: set[str] = set()
        self.named: set[str] = set()

    @property
    def requested(self) -> pa.Array:
        """Return the ids that the deletion requests name."""
        ids = [row_id for request in self.requests.values() for row_id in request]
        return pa.array(ids, pa.string())

    @property
    def size(self) -> int:
        """Return the number of rows after `max_rows`."""
        return min(self.selected, self.source.max_rows or self.selected)

    def ids(self) -> list[str]:
        """Return the ids of the set's rows after `max_rows`, in their order."""
        _, stays = thinned(0, self.selected, self.selected, self.size)
        return list(compress(ids_in_order(self.keys), stays.to_pylist()))

    def add_block(self, block: Any, summary: Summary, keys: Any) -> None:
        """Collect a block of this set, and pass over those of others.

        The order of the blocks is that of the rows, so positions follow from counts alone.
        """
        if summary.set != self.name:
            return
        if not self.fault:
            self.fault, self.trace = summary.fault, summary.trace
        self.values.update(summary.values)
        self.named.update(summary.named)
        self.digest += summary.digest
        if summary.selected:
            self.blocks.append(block)
            self.keys.append(keys)
            self.first_rows.append(self.selected)
        self.selected += summary.selected

    def check(self) -> None:
        """Check the rows and the selectors of the set.

        Raises:
            ConfigError: a row has a fault, the set is empty, an id comes twice, or a selector
                names an id or value that the source does not have.
        """
        where, path = f"data.{self.name}", self.source.path
        # A fault ends the reading of its piece, so that everything else would follow from it.
        if self.fault:
            error = ConfigError(self.fault)
            if self.trace:  # shown by `--debug`
                error.add_note(f"On the worker, without messages:\n{self.trace}")
            raise error
        for key, ids in self.requests.items():
            missing = [row_id for row_id in ids if row_id not in self.named]
            if missing:
                raise ConfigError(
                    f"{where}.{key}: {getattr(self.source, key)} names "
                    f"{_counted(len(missing), 'id')} that {path} does not have: "
                    f"{quoted(missing)}; allowed: ids of its rows"
                )
        values = map(str, self.source.values)
        missing_values = [value for value in values if value not in self.values]
        if missing_values:
            raise ConfigError(
                f"{where}.values: {path} has no row whose '{self.source.column}' is "
                f"{quoted(missing_values)}; allowed: values of that column"
            )
        if not self.selected:
            fault = "has no rows"
            if self.requests or self.source.column is not None or self.source.share is not None:
                fault = "no row is left after ids, exclude_ids, column and share"
            raise ConfigError(f"{where}.path: {path}: {fault}; allowed: at least one row")
        repeated = repeated_ids(self.keys, self.selected)
        if repeated.number:
            raise ConfigError(
                f"{where}.path: {path} has {_counted(repeated.number, 'id')} more than once: "
                f"{quoted(repeated.ids)}; allowed: a row an id"
            )

    def check_disjoint(self, other: "SetReader", key_text: str) -> None:
        """Refuse rows that also stand in another set.

        `key_text` says by what rows are one (see `shared_rows`), for the message.

        Raises:
            ConfigError: the sets share rows.
        """
        shared = shared_rows(self.keys, other.keys)
        if shared.number:
            raise ConfigError(
                f"data.{self.name}.path: {self.source.path} shares "
                f"{_counted(shared.number, 'row')} with {other.name} ({other.source.path}), by "
                f"{key_text}: ids {quoted(shared.ids)}; allowed: {self.name} rows that "
                f"{other.name} does not have"
            )


def _counted(count: int, noun: str) -> str:
    """Return a count with its noun in the singular or plural."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
