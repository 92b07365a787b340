"""Where rows come from: the files behind a path as pieces, and the ids of a deletion request.

A path is a file, a folder or a glob (local, `s3://`, `gs://`), a folder written by `datasets.save_to_disk`, or a hub
name. One Ray Data task reads one piece (`pipelines.data.readers`). Every file below a folder is read or refused by its
name, since a row that never arrives would never be forgotten.
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
from pipelines.data.cells import id_text
from pipelines.data.readers import (
    ALLOWED,
    COMPRESSIONS,
    SUFFIXES,
    Piece,
    SourceError,
    json_values,
)
from pipelines.storage.filesystem import one_line, open_filesystem

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
SAVED_DATASET_FILES = {"dataset_dict.json", "state.json"}
ABOUT_THE_DATA = {"README", "LICENSE", "LICENCE", "NOTICE", "CITATION", "CHANGELOG"}  # never rows


def find_pieces(name: str, source: SourceConfig) -> list[Piece]:
    """Return the pieces of the set `name`, in the order of their paths.

    Raises:
        ConfigError: nothing is there, it cannot be listed, or a file is in none of our formats.
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
    if not files and filesystem.type_name == "local" and _looks_like_hub_name(source.path):
        return [Piece(name, source.path, "hub", source.path, None, source.split)]
    if not files:
        raise ConfigError(
            f"{key}: {source.path} not found, or holds no such file; allowed: {ALLOWED}"
        )
    kind = _common_format(f"{key}: {source.path}", filesystem, files)
    if len(files) == 1:
        return [Piece(name, source.path, kind, files[0], filesystem, source.split)]
    base = os.path.commonpath([PurePosixPath(file).parent for file in files])
    return [
        Piece(name, file, kind, file, filesystem, source.split, f"{os.path.relpath(file, base)}:")
        for file in files
    ]


def list_files(filesystem: fs.FileSystem, path: str) -> list[str]:
    """Return the sorted files of a file, of a folder and its subfolders, or of a glob, whose `**` stands for folders at
    any depth; none where nothing is.

    Hidden folders below it are passed over: names that begin with a dot or an underscore.
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
        # Arrow leaves a link that leads nowhere out of its lists, and follows one in a circle forty times.
        return [str(path) for path in _local_files_below(Path(folder))]
    selector = fs.FileSelector(folder, recursive=True, allow_not_found=True)
    files = [entry.path for entry in filesystem.get_file_info(selector) if entry.is_file]
    depth = len(PurePosixPath(folder).parts)
    hidden = {file for file in files if any(map(_is_hidden, file.split("/")[depth:-1]))}
    return sorted(set(files) - hidden)


def _local_files_below(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Yield all that is no folder, links to nothing included; a link to a folder that it lies in is not followed."""
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
    path = PurePosixPath(file)
    return _is_hidden(path.name) or path.stem.upper() in ABOUT_THE_DATA or path.suffix == ".md"


def _matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether a path's names match a glob's: `**` any number of folders, all else one name."""
    if not patterns:
        return not names
    if patterns[0] == "**":
        return any(_matches(names[skip:], patterns[1:] or ("*",)) for skip in range(len(names)))
    return bool(names) and fnmatchcase(names[0], patterns[0]) and _matches(names[1:], patterns[1:])


def _common_format(where: str, filesystem: fs.FileSystem, files: list[str]) -> str:
    """Return the format of all files, or refuse those that have none or another."""
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
                    f"{where} holds {PurePosixPath(file).name}, a link to nothing or no file; allowed: {ALLOWED}"
                )
    return str(formats.pop())


def _format_of(file: str) -> str | None:
    path = PurePosixPath(file.lower())
    if path.suffix in COMPRESSIONS and SUFFIXES.get(path.with_suffix("").suffix) != "parquet":
        path = path.with_suffix("")
    return SUFFIXES.get(path.suffix)


def _looks_like_hub_name(path: str) -> bool:
    """Whether a path that is not there may be meant for the hub: owner/name, and no folder called owner."""
    return (
        bool(HUB_NAME.fullmatch(path))
        and _format_of(path) is None
        and not Path(path.split("/")[0]).exists()
    )


def request_ids(path: str, key: str = "request") -> list[str]:
    """Return the ids of a deletion request, each once, in their order.

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
        raise ConfigError(
            f"{key}: {path} cannot be read ({type(error).__name__}); {allowed}"
        ) from None
    if not ids:
        raise ConfigError(f"{key}: {path} is empty; {allowed}")
    return list(ids)
