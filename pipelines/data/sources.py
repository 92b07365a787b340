"""Where rows come from: finding the files behind a path, and reading them one row at a time.

A path is a file, a folder or a glob of JSONL, Parquet or CSV (local, `s3://`, `gs://`), a folder written by
`datasets.save_to_disk`, or a hub name. It becomes pieces; one Ray Data task
reads one piece as a stream, so a file may be larger than memory. Messages name keys, files, columns, line numbers and
ids, and never what a row says.
"""

import csv
import io
import json
import logging
import os
import re
import socket
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from pyarrow import fs, parquet

from pipelines.config.data import SourceConfig
from pipelines.config.schema import ConfigError
from pipelines.storage.filesystem import list_files, one_line, open_filesystem

FORMATS = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".csv": "csv"}
ALLOWED = (
    "a .jsonl, .json (one object a line), .parquet or .csv file, a folder or a glob of them, a saved datasets folder "
    "(all local, s3:// or gs://), or a hub name (owner/name or owner/name:configuration)"
)
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
SAVED_DATASET_FILES = {"dataset_dict.json", "state.json"}
CHUNK_ROWS = 256  # rows decoded at once: bounds memory where rows are whole documents


class SourceError(Exception):
    """What is wrong with a source, without its content; `key` is the configuration key at fault."""

    def __init__(self, text: str, key: str = "path") -> None:
        super().__init__(text, key)
        self.text = text
        self.key = key


@dataclass(frozen=True)
class Piece:
    """What one task reads: a file, a saved data set or a hub data set of one set. Pickles."""

    set: str
    shown: str  # as messages name it
    format: str  # jsonl, parquet, csv, saved, or hub
    path: str  # inside the file system; a hub name for hub
    filesystem: fs.FileSystem | None
    split: str
    id_prefix: str = (
        ""  # what stands before a row number that serves as id, where a set has several files
    )

    @property
    def is_local(self) -> bool:
        """Whether the driver's machine is the one to read it: it has the files, or the hub's token and cache."""
        return self.filesystem is None or isinstance(self.filesystem, fs.LocalFileSystem)


class Rows(NamedTuple):
    """The columns of a piece (None where it is empty and has none) and its rows as dicts."""

    columns: list[str] | None
    rows: Iterator[dict[str, Any]]


def find_pieces(name: str, source: SourceConfig) -> list[Piece]:
    """The pieces of the set `name`, in the order of their paths.

    Raises:
        ConfigError: nothing is there, it cannot be listed, or its format is none of ours.
    """
    key = f"data.{name}.path"
    filesystem, path = open_filesystem(source.path, key)
    try:
        found = list_files(filesystem, path)
        is_empty = found == [path] and filesystem.get_file_info(path).size == 0
    except OSError as error:
        raise ConfigError(
            f"{key}: {source.path} cannot be reached ({one_line(error)}); allowed: {ALLOWED}"
        ) from None
    if is_empty:
        raise ConfigError(f"{key}: {source.path} is empty; allowed: a file with rows")
    if SAVED_DATASET_FILES & {PurePosixPath(file).name for file in found}:
        return [Piece(name, source.path, "saved", path, filesystem, source.split)]
    if found != [path]:  # a folder may hold a README
        found = [file for file in found if PurePosixPath(file).suffix.lower() in FORMATS]
    if not found and filesystem.type_name == "local" and _looks_like_hub_name(source.path):
        return [Piece(name, source.path, "hub", source.path, None, source.split)]
    if not found:
        raise ConfigError(
            f"{key}: {source.path} not found, or holds no such file; allowed: {ALLOWED}"
        )
    formats = {file: FORMATS.get(PurePosixPath(file).suffix.lower()) for file in found}
    if None in formats.values() or len(set(formats.values())) > 1:
        suffixes = ", ".join(sorted({PurePosixPath(file).suffix or "no suffix" for file in found}))
        raise ConfigError(
            f"{key}: {source.path} is or holds {suffixes}; allowed: {ALLOWED}, of one kind"
        )
    if len(found) == 1:
        return [
            Piece(name, source.path, str(formats[found[0]]), found[0], filesystem, source.split)
        ]
    base = os.path.commonpath([str(PurePosixPath(file).parent) for file in found])
    return [
        Piece(
            name,
            file,
            str(kind),
            file,
            filesystem,
            source.split,
            f"{PurePosixPath(file).relative_to(base)}:",
        )
        for file, kind in formats.items()
    ]


def request_ids(path: str, key: str = "request") -> list[str]:
    """The ids of a deletion request, each once, in their order.

    Args:
        path: JSONL (local, s3://, gs://); a line is {"id": "..."} or a bare JSON string; whole numbers count as text.
        key: the configuration key that messages name.

    Raises:
        ConfigError: the file is missing, empty or unreadable, or a line is not such an id.
    """
    allowed = 'allowed: a JSONL file of ids, a line being {"id": "..."} or "..."'
    filesystem, inner = open_filesystem(path, key)
    ids: dict[str, None] = {}
    try:
        with filesystem.open_input_stream(inner) as raw:
            for number, value in _json_lines(io.BufferedReader(raw)):
                found = id_text(value.get("id") if isinstance(value, dict) else value)
                if found is None:
                    raise SourceError(f"line {number} holds no id")
                ids[found] = None
    except SourceError as fault:
        raise ConfigError(f"{key}: {path}: {fault.text}; {allowed}") from None
    except FileNotFoundError:
        raise ConfigError(f"{key}: {path} not found; {allowed}") from None
    except OSError as error:
        raise ConfigError(
            f"{key}: {path} cannot be read ({type(error).__name__}); {allowed}"
        ) from None
    if not ids:
        raise ConfigError(f"{key}: {path} is empty; {allowed}")
    return list(ids)


def id_text(value: Any) -> str | None:
    """An id as text; None where the value cannot be one."""
    if isinstance(value, str) and value and is_unicode(value):
        return value
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def is_unicode(text: str) -> bool:
    """Whether the text can be stored: JSON may spell half of a surrogate pair, which no encoding has."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


@contextmanager
def open_rows(piece: Piece, wanted: set[str]) -> Generator[Rows]:
    """Read a piece as a stream of dicts, which hold at least its columns among `wanted`.

    Raises:
        SourceError: it cannot be read; nothing of its content is in the fault or chained to it.
    """
    readers = {
        "jsonl": _open_jsonl, "csv": _open_csv, "parquet": _open_parquet, "saved": _open_saved, "hub": _open_hub,
    }  # fmt: skip
    try:
        with readers[piece.format](piece, wanted) as rows:
            yield rows
    except SourceError:
        raise
    except FileNotFoundError:
        raise SourceError(
            f"was found from the driver, but not from a worker on {socket.gethostname()}; "
            "allowed: a path that all nodes share, s3:// or gs://"
        ) from None
    except Exception as error:
        reason = (
            f": {one_line(error)}" if isinstance(error, OSError) else ""
        )  # a file system knows no rows
        raise SourceError(
            f"cannot be read as {piece.format} ({type(error).__name__}{reason}); allowed: {ALLOWED}"
        ) from None


@contextmanager
def _open_jsonl(piece: Piece, wanted: set[str]) -> Generator[Rows]:
    with _stream(piece) as stream:
        rows = _json_objects(stream)
        first = next(rows, None)
        yield Rows(None if first is None else list(first), _chain(first, rows))


def _chain(
    first: dict[str, Any] | None, rest: Iterator[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    if first is not None:
        yield first
    yield from rest


def _json_objects(stream: io.BufferedReader) -> Iterator[dict[str, Any]]:
    for number, value in _json_lines(stream):
        if not isinstance(value, dict):
            raise SourceError(
                f"line {number} is JSON but not an object; allowed: one JSON object a line"
            )
        yield value


def _json_lines(stream: io.BufferedReader) -> Iterator[tuple[int, Any]]:
    """Line numbers, counted from 1, and values; blank lines are left out."""
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except (ValueError, RecursionError):
            raise SourceError(
                f"line {number} is not JSON in UTF-8; allowed: one JSON value a line"
            ) from None


@contextmanager
def _open_csv(piece: Piece, wanted: set[str]) -> Generator[Rows]:
    csv.field_size_limit(2**31 - 1)  # the default refuses texts above 128 KiB
    with (
        _stream(piece) as stream,
        io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text,
    ):
        reader = csv.DictReader(text, strict=True)
        try:
            columns = reader.fieldnames
        except csv.Error:
            raise SourceError(
                "line 1 is not CSV; allowed: comma-separated values under a line of column names"
            ) from None
        yield Rows(None if columns is None else list(columns), _csv_rows(reader))


def _csv_rows(reader: "csv.DictReader[str]") -> Iterator[dict[str, Any]]:
    while True:
        try:
            row = next(reader, None)
        except csv.Error:
            raise SourceError(
                f"line {reader.line_num} is not CSV; allowed: comma-separated values"
            ) from None
        if row is None:
            return
        if None in row or None in row.values():  # DictReader's signs for too many and too few
            raise SourceError(
                f"line {reader.line_num} has more or fewer values than the header; allowed: equally many"
            )
        yield row


@contextmanager
def _open_parquet(piece: Piece, wanted: set[str]) -> Generator[Rows]:
    assert piece.filesystem is not None
    with piece.filesystem.open_input_file(piece.path) as raw:
        file = parquet.ParquetFile(raw)
        names = file.schema_arrow.names
        batches = file.iter_batches(
            batch_size=CHUNK_ROWS, columns=[name for name in names if name in wanted]
        )
        yield Rows(names, (row for batch in batches for row in batch.to_pylist()))


@contextmanager
def _open_saved(piece: Piece, wanted: set[str]) -> Generator[Rows]:
    import datasets  # takes a second to import, and most workers do without

    assert piece.filesystem is not None
    with tempfile.TemporaryDirectory() as folder:
        path = piece.path
        if not piece.is_local:  # memory mapping needs a local copy
            fs.copy_files(piece.path, folder, source_filesystem=piece.filesystem)
            path = folder
        loaded = datasets.load_from_disk(path)
        if isinstance(loaded, datasets.DatasetDict):
            if piece.split not in loaded:
                splits = ", ".join(sorted(map(str, loaded)))
                raise SourceError(f"has no split '{piece.split}'; it has: {splits}", key="split")
            loaded = loaded[piece.split]
        yield _dataset_rows(loaded, wanted)


@contextmanager
def _open_hub(piece: Piece, wanted: set[str]) -> Generator[Rows]:
    import datasets

    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(
        logging.ERROR
    )  # in the worker; it warns at every retry
    name, _, configuration = piece.path.partition(":")
    try:
        loaded = datasets.load_dataset(name, configuration or None, split=piece.split)
    except (
        OSError,
        ValueError,
    ) as error:  # before rows are read: names, splits, configurations, the network
        raise SourceError(
            f"is no file here, and the hub does not give it ({type(error).__name__}: {one_line(error)}); "
            f"allowed: {ALLOWED}"
        ) from None
    yield _dataset_rows(loaded, wanted)


def _dataset_rows(dataset: Any, wanted: set[str]) -> Rows:
    """Rows as Arrow has them: an image is {"bytes", "path"} and not decoded, a class is its number."""
    from datasets.table import embed_table_storage

    names = list(dataset.column_names)
    chosen = dataset.select_columns([name for name in names if name in wanted]).with_format("arrow")
    tables = map(
        embed_table_storage, chosen.iter(batch_size=CHUNK_ROWS)
    )  # images may be but paths to their files
    return Rows(names, (row for table in tables for row in table.to_pylist()))


@contextmanager
def _stream(piece: Piece) -> Generator[io.BufferedReader]:
    assert piece.filesystem is not None
    with (
        piece.filesystem.open_input_stream(piece.path) as raw,
        io.BufferedReader(raw, 1 << 20) as stream,
    ):
        yield stream


def _looks_like_hub_name(path: str) -> bool:
    """Whether a path that is not there may be meant for the hub: owner/name, and no folder called owner."""
    is_file_name = Path(path).suffix.lower() in FORMATS
    return (
        bool(HUB_NAME.fullmatch(path))
        and not is_file_name
        and not Path(path.split("/")[0]).exists()
    )
