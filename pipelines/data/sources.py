"""Sources of rows: the files behind a path as pieces, and the ids of a deletion request.

A path is a file, a folder or a glob (local, `s3://`, `gs://`), a folder written by
`datasets.save_to_disk`, or a hub name. One Ray Data task reads one piece
(`pipelines.data.readers`). Every file below a folder is read or refused by its name, and none is
skipped as unknown: a row that is never read would never be forgotten.
"""

import os
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from io import BufferedReader
from pathlib import Path, PurePosixPath

from pyarrow import fs

from pipelines.config.data import SourceConfig
from pipelines.config.schema import ConfigError
from pipelines.config.text import one_line
from pipelines.data.cells import id_text
from pipelines.data.readers import (
    ALLOWED,
    COMPRESSIONS,
    SUFFIXES,
    Piece,
    SourceError,
    json_values,
)
from pipelines.storage.filesystem import open_filesystem

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
SAVED_DATASET_FILES = {"dataset_dict.json", "state.json"}
ABOUT_THE_DATA = {"README", "LICENSE", "LICENCE", "NOTICE", "CITATION", "CHANGELOG"}  # never rows


def find_pieces(name: str, source: SourceConfig) -> list[Piece]:
    """Return the pieces of the set `name`, in the order of their paths.

    Raises:
        ConfigError: the path does not exist or cannot be listed, or a file has no known format.
    """
    key = f"data.{name}.path"
    filesystem, path = open_filesystem(source.path, key)
    try:
        info = filesystem.get_file_info(path)
        files = list_files(filesystem, path)
    except OSError as error:
        raise ConfigError(
            f"{key}: {source.path} cannot be reached ({one_line(error)}); allowed: {ALLOWED}"
        ) from None
    if info.is_file and info.size == 0:
        raise ConfigError(f"{key}: {source.path} is empty; allowed: a file with rows")
    if SAVED_DATASET_FILES & {os.path.relpath(file, path) for file in files}:
        return [Piece(name, source.path, "saved", path, filesystem, source.split)]
    if not info.is_file:
        files = [file for file in files if _format_of(file) or not _is_about_the_data(file)]
    # A hub name is also a relative path, so a local file or folder of that name comes first. A
    # missing file in an existing folder is an error, and so is a missing file of a known format.
    looks_like_hub_name = (
        HUB_NAME.fullmatch(source.path)
        and _format_of(source.path) is None
        and not Path(source.path.split("/")[0]).exists()
    )
    if not files and filesystem.type_name == "local" and looks_like_hub_name:
        return [Piece(name, source.path, "hub", source.path, None, source.split)]
    if not files:
        raise ConfigError(
            f"{key}: {source.path} not found, or holds no such file; allowed: {ALLOWED}"
        )
    kind = _common_format(f"{key}: {source.path}", filesystem, files)
    if len(files) == 1:
        return [Piece(name, source.path, kind, files[0], filesystem, source.split)]
    # Row numbers serve as ids where there is no id column, so each file needs its own prefix. It is
    # relative, so that the ids stay the same when the folder is moved.
    base = os.path.commonpath([PurePosixPath(file).parent for file in files])
    pieces: list[Piece] = []
    for file in files:
        id_prefix = f"{os.path.relpath(file, base)}:"
        pieces.append(Piece(name, file, kind, file, filesystem, source.split, id_prefix))
    return pieces


def list_files(filesystem: fs.FileSystem, path: str) -> list[str]:
    """Return the sorted files that a path names, [] where nothing exists.

    The path is a file, a folder (which includes its subfolders) or a glob, where `**` matches
    folders at any depth. Hidden folders below it are skipped: their names begin with a dot or an
    underscore.
    """
    info = filesystem.get_file_info(path)
    if info.is_file:
        return [path]
    if info.type == fs.FileType.Directory:
        return _files_below(filesystem, path)
    parts = PurePosixPath(path).parts
    fixed = 0
    while fixed < len(parts) and not set("*?[") & set(parts[fixed]):
        fixed += 1
    if fixed == len(parts):
        return []
    base = str(PurePosixPath(*parts[:fixed]))
    files = _files_below(filesystem, base)
    return [file for file in files if _matches(PurePosixPath(file).parts[fixed:], parts[fixed:])]


def _files_below(filesystem: fs.FileSystem, folder: str) -> list[str]:
    if isinstance(filesystem, fs.LocalFileSystem):
        # Arrow omits a link to nothing, which would lose its rows in silence, and follows a link
        # to a parent folder forty times.
        return [str(path) for path in _local_files_below(Path(folder))]
    selector = fs.FileSelector(folder, recursive=True, allow_not_found=True)
    depth = len(PurePosixPath(folder).parts)
    files: list[str] = []
    for entry in filesystem.get_file_info(selector):
        folders = entry.path.split("/")[depth:-1]
        if entry.is_file and not any(map(_is_hidden, folders)):
            files.append(entry.path)
    return sorted(set(files))


def _local_files_below(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Yield everything below a folder that is not a folder, links to nothing included.

    A link to one of the folders `above` it is not followed, because it would lead in circles.
    """
    real = folder.resolve()
    if real in above or not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if not path.is_dir():
            yield path
        elif not _is_hidden(path.name):
            yield from _local_files_below(path, above | {real})


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_"))


def _is_about_the_data(file: str) -> bool:
    """Return whether a file without a known format documents the data, and so holds no rows."""
    path = PurePosixPath(file)
    return _is_hidden(path.name) or path.stem.upper() in ABOUT_THE_DATA or path.suffix == ".md"


def _matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Return whether the names of a path match a glob's.

    A pattern matches one name, and `**` matches any number of folders, none included.
    """
    # fnmatch alone would let `*` match a "/", and PurePath.full_match exists from Python 3.13 on.
    if not patterns:
        return not names
    if patterns[0] == "**":
        return any(_matches(names[skip:], patterns[1:] or ("*",)) for skip in range(len(names)))
    return bool(names) and fnmatchcase(names[0], patterns[0]) and _matches(names[1:], patterns[1:])


def _common_format(where: str, filesystem: fs.FileSystem, files: list[str]) -> str:
    """Return the one format of all files.

    Raises:
        ConfigError: their formats are unknown or differ, or a local one is not a file.
    """
    formats = {_format_of(file) for file in files}
    if len(formats) > 1 or None in formats:
        endings = sorted({PurePosixPath(file).suffix or "no suffix" for file in files})
        strange = [PurePosixPath(file).name for file in files if _format_of(file) is None]
        named = f" ({', '.join(strange[:5])})" if strange and len(files) > 1 else ""
        raise ConfigError(
            f"{where} is or holds {', '.join(endings)}{named}; allowed: {ALLOWED}, of one kind"
        )
    if isinstance(filesystem, fs.LocalFileSystem):
        for file in files:
            if not Path(file).is_file():
                raise ConfigError(
                    f"{where} holds {PurePosixPath(file).name}, a link to nothing or no file; "
                    f"allowed: {ALLOWED}"
                )
    return str(formats.pop())


def _format_of(file: str) -> str | None:
    """Return the format that a file's endings name, which is a key of READERS."""
    path = PurePosixPath(file.lower())
    # Parquet compresses its columns itself and needs random access, which a compressed file lacks.
    if path.suffix in COMPRESSIONS and SUFFIXES.get(path.with_suffix("").suffix) != "parquet":
        path = path.with_suffix("")
    return SUFFIXES.get(path.suffix)


def request_ids(path: str, key: str = "request") -> list[str]:
    """Return the distinct ids of a deletion request, in their order.

    Args:
        path: a JSONL file (local, s3://, gs://). A line is {"id": "..."} or a bare JSON string.
            Whole numbers count as text.
        key: the configuration key that messages name.

    Raises:
        ConfigError: the file is missing, empty or unreadable, or a line is not an id.
    """
    allowed = 'allowed: a JSONL file of ids, a line being {"id": "..."} or "..."'
    filesystem, inner = open_filesystem(path, key)
    ids: dict[str, None] = {}  # a set that keeps its order
    try:
        with filesystem.open_input_stream(inner) as raw:
            for where, value in json_values(BufferedReader(raw)):
                row_id = id_text(value.get("id") if isinstance(value, dict) else value)
                if row_id is None:
                    raise SourceError(f"{where} holds no id")
                ids[row_id] = None
    except SourceError as fault:
        raise ConfigError(f"{key}: {path}: {fault.text}; {allowed}") from None
    except FileNotFoundError:
        raise ConfigError(f"{key}: {path} not found; {allowed}") from None
    except OSError as error:
        reason = type(error).__name__
        raise ConfigError(f"{key}: {path} cannot be read ({reason}); {allowed}") from None
    if not ids:
        raise ConfigError(f"{key}: {path} is empty; {allowed}")
    return list(ids)
