"""Readers: one per format of a source, each a stream of rows as dicts.

To add a format, write a function, add it to READERS and add its file endings to SUFFIXES. A
reader holds a few rows at a time, so a file may be larger than memory. Error messages name keys,
files, columns, line numbers and ids. They never quote a row.
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

from pipelines.config.text import one_line, reason_of
from pipelines.storage.hub import require_hub

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
    "a .jsonl, .ndjson, .json (one object a line or one array), .csv or .tsv file, "
    "each of them compressed (.gz, .zst, .bz2) or not, a .parquet file, a folder or a glob of "
    "them, a saved datasets folder (all local, s3:// or gs://), "
    "or a hub name (owner/name or owner/name:configuration)"
)
CHUNK_ROWS = 256  # rows decoded at once: bounds memory where rows are long documents
JSON_SPACE = b" \t\r\n"


class SourceError(Exception):
    """A fault of a source, in words that quote none of its rows.

    Args:
        text: the fault, as the end of a sentence that begins with the source's name.
        key: the configuration key at fault.
    """

    def __init__(self, text: str, key: str = "path") -> None:
        super().__init__(text, key)  # both arguments, because exceptions pickle by `args`
        self.text = text
        self.key = key


@dataclass(frozen=True)
class Piece:
    """The part of one set that one Ray task reads: a file, or a data set of `datasets`. Pickles."""

    set: str
    shown: str  # its name in messages
    format: str  # a key of READERS
    path: str  # inside the file system, or the hub name
    filesystem: fs.FileSystem | None  # None for the hub
    split: str
    id_prefix: str = ""  # precedes a row number that serves as id, where a set has several files

    @property
    def is_local(self) -> bool:
        """Return whether only the driver's machine can read it.

        That machine has the local files, and the hub's token and cache.
        """
        return self.filesystem is None or isinstance(self.filesystem, fs.LocalFileSystem)

    @property
    def store(self) -> fs.FileSystem:
        """Return the file system of a piece that is not on the hub."""
        assert self.filesystem is not None, f"{self.shown} lies in no file system"
        return self.filesystem


class Rows(NamedTuple):
    """A piece's column names (None where it is empty and has none) and its rows as dicts."""

    columns: list[str] | None
    rows: Iterator[dict[str, Any]]


@contextmanager
def open_rows(piece: Piece, wanted: set[str]) -> Generator[Rows]:
    """Open a piece as a stream of dicts, which hold at least its columns among `wanted`.

    Raises:
        SourceError: the piece cannot be read. Its text quotes no row, but the message of the
            exception that it is chained to may.
    """
    try:
        with READERS[piece.format](piece, wanted) as rows:
            _refuse_repeated(rows.columns or (), "has the column")
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
        if isinstance(error, OSError):  # a file system's message cannot quote a row
            reason += f": {one_line(error)}"
        raise SourceError(
            f"cannot be read as {piece.format} ({reason}, raised at {raised_at(error)}); "
            f"allowed: {ALLOWED}"
        ) from error


def raised_at(error: BaseException) -> str:
    """Return the module and line that raised, which locate a fault and quote no row."""
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    return f"{frame.f_globals.get('__name__')}:{line}"


def trace_of(error: BaseException) -> str:
    """Return the tracebacks of the exceptions that an exception is chained to, without messages."""
    lines: list[str] = []
    link = error.__cause__
    while link is not None:
        lines.append(f"{type(link).__name__}, most recent call last:\n")
        lines += traceback.format_tb(link.__traceback__)
        link = link.__cause__ or link.__context__
    return "".join(lines).rstrip()


def _refuse_repeated(names: Iterable[str], subject: str) -> None:
    """Refuse a column or key that comes twice, because a dict would silently keep the last one."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise SourceError(f"{subject} '{name}' twice; allowed: each once")
        seen.add(name)


# ---- JSON ----------------------------------------------------------------------------------------


def parse_json(text: str | bytes, where: str, expected: str) -> Any:
    """Parse JSON in UTF-8.

    Raises:
        SourceError: it is not JSON, or an object has a key twice. The text names the place
            (`where`) and what is `expected` there.
    """

    def to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            _refuse_repeated([name for name, _ in pairs], f"{where} has the key")
        return value

    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")  # json would guess UTF-16 and UTF-32, too
        return json.loads(text, object_pairs_hook=to_dict)
    except (ValueError, RecursionError):
        raise SourceError(f"{where} is not JSON in UTF-8; allowed: {expected}") from None


def json_values(stream: io.BufferedReader, may_be_array: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield each line's place, in the words of a message, and its value. Blank lines are skipped.

    With `may_be_array` a file that begins with `[` is one JSON array, which is read at once.
    """
    for number, line in enumerate(stream, 1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)  # Windows editors write one
        if not line.strip():
            continue
        if may_be_array and line.lstrip(JSON_SPACE).startswith(b"["):
            items = parse_json(line + stream.read(), "the array", "a JSON array of objects")
            for index, item in enumerate(items):
                yield f"item {index} (counted from 0)", item
            return
        may_be_array = False  # past the first value
        where = f"line {number}"
        yield where, parse_json(line, where, "one JSON value a line")


@contextmanager
def open_json(piece: Piece, wanted: set[str]) -> Generator[Rows]:
    """Open JSON objects, one a line or all in one array."""
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
            allowed = "one JSON object a line or item"
            raise SourceError(f"{where} is JSON but not an object; allowed: {allowed}")
        yield value


# ---- CSV -----------------------------------------------------------------------------------------


@contextmanager
def open_csv(piece: Piece, wanted: set[str]) -> Generator[Rows]:
    """Open values separated by commas, semicolons or tabs under a line of column names."""
    # Arrow's CSV reader does not serve: it refuses a text longer than its block, accepts a quote
    # that is never closed, and counts rows, which are not lines where a text has several.
    csv.field_size_limit(2**31 - 1)  # the default refuses texts above 128 KiB
    with (
        _stream(piece) as stream,
        # The "-sig" drops a byte order mark. The csv module wants line ends as they are.
        io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text,
    ):
        lines = _csv_lines(text)
        header = next(lines, "")
        unquoted = re.sub(r'"[^"]*"', "", header)
        delimiter = next((mark for mark in ",;\t" if mark in unquoted), ",")
        reader = csv.DictReader(chain([header], lines), delimiter=delimiter, strict=True)
        try:
            columns = list(reader.fieldnames or ())
        except csv.Error:
            words = "separated values under a line of column names"
            raise SourceError(f"line 1 is not CSV; allowed: {words}") from None
        _refuse_repeated(columns, "line 1 has the column")
        yield Rows(columns if header else None, _csv_rows(reader))


def _csv_lines(lines: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if "\0" in line:
            raise SourceError(f"line {number} has a NUL byte; allowed: text without NUL bytes")
        yield line


def _csv_rows(reader: "csv.DictReader[str]") -> Iterator[dict[str, Any]]:
    try:
        for row in reader:
            # DictReader puts surplus values under the key None, and None where a value is missing.
            if None in row or None in row.values():
                where = f"line {reader.line_num} has more or fewer values"
                raise SourceError(f"{where} than the header; allowed: as many")
            yield row
    except csv.Error:
        where = f"line {reader.line_num}"
        raise SourceError(f"{where} is not CSV; allowed: separated values") from None


# ---- Arrow ---------------------------------------------------------------------------------------


@contextmanager
def open_parquet(piece: Piece, wanted: set[str]) -> Generator[Rows]:
    """Open a Parquet file. Only the wanted columns are decoded."""
    with piece.store.open_input_file(piece.path) as raw:
        file = parquet.ParquetFile(raw)
        names = file.schema_arrow.names
        batches = file.iter_batches(CHUNK_ROWS, columns=[name for name in names if name in wanted])
        yield Rows(names, chain.from_iterable(batch.to_pylist() for batch in batches))


@contextmanager
def open_saved(piece: Piece, wanted: set[str]) -> Generator[Rows]:
    """Open a folder that `datasets.save_to_disk` wrote."""
    import datasets  # takes a second to import, and most workers never need it

    with tempfile.TemporaryDirectory() as folder:
        path = piece.path
        if not piece.is_local:  # `datasets` maps the files into memory, which needs a local copy
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
def open_hub(piece: Piece, wanted: set[str]) -> Generator[Rows]:
    """Open a data set of the Hugging Face hub."""
    import datasets

    datasets.disable_progress_bars()
    # The hub's client logs a warning at every retry. Its level is set here, in the worker, because
    # Ray starts workers with the default logging.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    name, _, configuration = piece.path.partition(":")
    try:
        require_hub(name, "dataset")
        loaded = datasets.load_dataset(name, configuration or None, split=piece.split)
    # These are raised before rows are read, so their messages are safe to show: they name splits,
    # configurations or the network.
    except (OSError, ValueError) as error:
        fault = f"is no file here, and the hub does not give it ({reason_of(error)})"
        raise SourceError(f"{fault}; allowed: {ALLOWED}") from None
    yield _dataset_rows(loaded, wanted)


def _dataset_rows(dataset: Any, wanted: set[str]) -> Rows:
    """Stream rows as Arrow stores them: an image is {"bytes", "path"}, a class is its number."""
    from datasets.table import embed_table_storage

    names = list(dataset.column_names)
    # The Arrow format skips the decoding of images, which would only have to be undone.
    chosen = dataset.select_columns([name for name in names if name in wanted]).with_format("arrow")
    # An image may be stored as a path alone, to a file that another node does not have.
    tables = map(embed_table_storage, chosen.iter(batch_size=CHUNK_ROWS))
    return Rows(names, chain.from_iterable(table.to_pylist() for table in tables))


@contextmanager
def _stream(piece: Piece) -> Generator[io.BufferedReader]:
    # The compression is named here because Arrow detects it by endings in lower case only. It
    # would pass on the compressed bytes of a file called ROWS.CSV.GZ.
    compression = COMPRESSIONS.get(PurePosixPath(piece.path.lower()).suffix)
    with (
        piece.store.open_input_stream(piece.path, compression=compression) as raw,
        io.BufferedReader(raw, 1 << 20) as stream,
    ):
        yield stream


Reader = Callable[[Piece, set[str]], AbstractContextManager[Rows]]
READERS: dict[str, Reader] = {
    "jsonl": open_json,
    "csv": open_csv,
    "parquet": open_parquet,
    "saved": open_saved,
    "hub": open_hub,
}
