"""How rows are read: a table of formats, and for each of them a stream of rows as dicts.

A new format is a function and a line of READERS, and its endings in SUFFIXES where it comes as files. A reader holds a
few rows at a time, so a file may be larger than memory. Messages name keys, files, columns, line numbers and ids, and
never what a row says.
"""

import codecs
import csv
import io
import json
import logging
import re
import socket
import tempfile
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from pyarrow import fs, parquet

from pipelines.storage.filesystem import one_line

SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
ALLOWED = (
    "a .jsonl, .ndjson, .json (one object a line or one array), .csv or .tsv file, each of them compressed (.gz, .zst, "
    ".bz2) or not, a .parquet file, a folder or a glob of them, a saved datasets folder (all local, s3:// or gs://), "
    "or a hub name (owner/name or owner/name:configuration)"
)
CHUNK_ROWS = 256  # rows decoded at once: bounds memory where rows are whole documents
JSON_SPACE = b" \t\r\n"


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
    format: str  # a key of READERS
    path: str  # inside the file system; a hub name for hub
    filesystem: fs.FileSystem | None
    split: str
    id_prefix: str = ""  # before a row number that serves as id, where a set has several files

    @property
    def is_local(self) -> bool:
        """Whether the driver's machine must read it: it has the files, or the hub's token and cache."""
        return self.filesystem is None or isinstance(self.filesystem, fs.LocalFileSystem)

    @property
    def store(self) -> fs.FileSystem:
        """The file system of a piece that lies in one."""
        assert self.filesystem is not None, f"{self.shown} lies in no file system"
        return self.filesystem


class Rows(NamedTuple):
    """The columns of a piece (None where it is empty and has none) and its rows as dicts."""

    columns: list[str] | None
    rows: Iterator[dict[str, Any]]


@contextmanager
def open_rows(piece: Piece, wanted: set[str]) -> Generator[Rows]:
    """Read a piece as a stream of dicts, which hold at least its columns among `wanted`.

    Raises:
        SourceError: it cannot be read. The text says nothing of the content; the exception it is chained to may.
    """
    try:
        with READERS[piece.format](piece, wanted) as rows:
            _refuse_repeated(rows.columns or (), "")
            yield rows
    except SourceError:
        raise
    except FileNotFoundError:
        raise SourceError(
            f"was found from the driver, but not from a worker on {socket.gethostname()}; "
            "allowed: a path that all nodes share, s3:// or gs://"
        ) from None
    except Exception as error:
        reason = type(error).__name__
        if isinstance(error, OSError):  # a file system's message knows no rows
            reason += f": {one_line(error)}"
        raise SourceError(
            f"cannot be read as {piece.format} ({reason}, raised at {raised_at(error)}); "
            f"allowed: {ALLOWED}"
        ) from error


def raised_at(error: BaseException) -> str:
    """Return module and line of the raise, which say where a fault is and quote no row."""
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    return f"{frame.f_globals.get('__name__')}:{line}"


def trace_of(error: BaseException) -> str:
    """Return the traceback of an exception and of those it is chained to, without their messages."""
    lines: list[str] = []
    link = error.__cause__
    while link is not None:
        lines += [f"{type(link).__name__}, most recent call last:\n"]
        lines += traceback.format_tb(link.__traceback__)
        link = link.__cause__ or link.__context__
    return "".join(lines).rstrip()


def _refuse_repeated(columns: Iterable[str], where: str) -> None:
    """Refuse a column or key that comes twice: a dict would keep the last one in silence."""
    seen: set[str] = set()
    for column in columns:
        if column in seen:
            raise SourceError(f"{where}has the column '{column}' twice; allowed: each once")
        seen.add(column)


# ---- JSON ------------------------------------------------------------------------------------------------------------


class _RepeatedKeyError(Exception):
    """A JSON object has a key twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedKeyError(next(name for name in names if names.count(name) > 1))
    return value


def parse_json(text: str | bytes, where: str, expected: str) -> Any:
    """Parse JSON in UTF-8, or raise a SourceError that says `where` it stands and what is `expected`."""
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        return json.loads(text, object_pairs_hook=_object)
    except _RepeatedKeyError as error:
        raise SourceError(f"{where} has the key '{error}' twice; allowed: each once") from None
    except (ValueError, RecursionError):
        raise SourceError(f"{where} is not JSON in UTF-8; allowed: {expected}") from None


def json_values(stream: io.BufferedReader, may_be_array: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield each line's value behind the words that name it in a message; blank lines are left out.

    With `may_be_array` a file that begins with `[` is one JSON array, which is read at once.
    """
    for number, line in enumerate(stream, 1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        if may_be_array and line.lstrip(JSON_SPACE).startswith(b"["):
            items = parse_json(line + stream.read(), "the array", "a JSON array of objects")
            yield from (
                (f"item {index} (counted from 0)", item) for index, item in enumerate(items)
            )
            return
        may_be_array = False  # past the first value
        where = f"line {number}"
        yield where, parse_json(line, where, "one JSON value a line")


@contextmanager
def _open_json(piece: Piece, wanted: set[str]) -> Generator[Rows]:
    with _stream(piece) as stream:
        rows = _json_objects(stream)
        first = next(rows, None)
        if first is None:
            yield Rows(None, iter(()))
        else:
            yield Rows(list(first), chain([first], rows))


def _json_objects(stream: io.BufferedReader) -> Iterator[dict[str, Any]]:
    for where, value in json_values(stream, may_be_array=True):
        if not isinstance(value, dict):
            raise SourceError(
                f"{where} is JSON but not an object; allowed: one JSON object a line or item"
            )
        yield value


# ---- CSV -------------------------------------------------------------------------------------------------------------


@contextmanager
def _open_csv(piece: Piece, wanted: set[str]) -> Generator[Rows]:
    # Python's reader and not Arrow's: that one refuses a text longer than its block, accepts a quote that is never
    # closed, and counts rows, which are no lines where a text has several.
    csv.field_size_limit(2**31 - 1)  # the default refuses texts above 128 KiB
    with (
        _stream(piece) as stream,
        io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text,
    ):
        first_line = text.readline()
        reader = csv.DictReader(
            chain([first_line], text), delimiter=_delimiter(first_line), strict=True
        )
        try:
            columns = reader.fieldnames
        except csv.Error:
            raise SourceError(
                "line 1 is not CSV; allowed: separated values under a line of column names"
            ) from None
        _refuse_repeated(columns or (), "line 1 ")
        yield Rows(list(columns or ()) if first_line else None, _csv_rows(reader))


def _delimiter(header: str) -> str:
    """Return what separates the columns of a header: commas; where it has none, semicolons or tabs."""
    unquoted = re.sub(r'"[^"]*"', "", header)
    return next((mark for mark in ",;\t" if mark in unquoted), ",")


def _csv_rows(reader: "csv.DictReader[str]") -> Iterator[dict[str, Any]]:
    while True:
        try:
            row = next(reader, None)
        except csv.Error:
            raise SourceError(
                f"line {reader.line_num} is not CSV; allowed: separated values"
            ) from None
        if row is None:
            return
        if None in row or None in row.values():  # DictReader's signs for too many and too few
            raise SourceError(
                f"line {reader.line_num} has more or fewer values than the header; allowed: as many"
            )
        yield row


# ---- Arrow -----------------------------------------------------------------------------------------------------------


@contextmanager
def _open_parquet(piece: Piece, wanted: set[str]) -> Generator[Rows]:
    with piece.store.open_input_file(piece.path) as raw:
        file = parquet.ParquetFile(raw)
        names = file.schema_arrow.names
        batches = file.iter_batches(CHUNK_ROWS, columns=[name for name in names if name in wanted])
        yield Rows(names, chain.from_iterable(batch.to_pylist() for batch in batches))


@contextmanager
def _open_saved(piece: Piece, wanted: set[str]) -> Generator[Rows]:
    import datasets  # takes a second to import, and most workers do without

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
    # In the worker: the client warns at every retry.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    name, _, configuration = piece.path.partition(":")
    try:
        loaded = datasets.load_dataset(name, configuration or None, split=piece.split)
    # Raised before rows are read, so their text may be told: names, splits, configurations, the network.
    except (OSError, ValueError) as error:
        raise SourceError(
            f"is no file here, and the hub does not give it ({type(error).__name__}: {one_line(error)}); "
            f"allowed: {ALLOWED}"
        ) from None
    yield _dataset_rows(loaded, wanted)


def _dataset_rows(dataset: Any, wanted: set[str]) -> Rows:
    """Read rows as Arrow has them: an image is {"bytes", "path"} and not decoded, a class is its number."""
    from datasets.table import embed_table_storage

    names = list(dataset.column_names)
    chosen = dataset.select_columns([name for name in names if name in wanted]).with_format("arrow")
    # Images may be but paths to their files, which another node does not have.
    tables = map(embed_table_storage, chosen.iter(batch_size=CHUNK_ROWS))
    return Rows(names, chain.from_iterable(table.to_pylist() for table in tables))


@contextmanager
def _stream(piece: Piece) -> Generator[io.BufferedReader]:
    # Named, since Arrow knows these endings in small letters alone and would hand on packed bytes.
    compression = COMPRESSIONS.get(PurePosixPath(piece.path.lower()).suffix)
    with (
        piece.store.open_input_stream(piece.path, compression=compression) as raw,
        io.BufferedReader(raw, 1 << 20) as stream,
    ):
        yield stream


Reader = Callable[[Piece, set[str]], AbstractContextManager[Rows]]
READERS: dict[str, Reader] = {
    "jsonl": _open_json,
    "csv": _open_csv,
    "parquet": _open_parquet,
    "saved": _open_saved,
    "hub": _open_hub,
}
