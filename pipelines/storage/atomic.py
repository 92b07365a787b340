"""Atomic writes: a file or folder gets its name only when it is complete."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.config.data import ConfigError, check_path

PARTIAL = ".partial"


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a hidden path beside `target` to write to, and rename it to `target` at the end.

    If the block raises an error or the process dies in it, `target` stays as it was. The next
    attempt removes the rest of the hidden file or folder.
    """
    # It lies beside the target because POSIX renames atomically only within one file system. Its
    # name is hidden because an upload leaves out hidden files.
    partial = target.with_name(f".{target.name}{PARTIAL}")
    if partial.is_dir():
        shutil.rmtree(partial)
    else:
        partial.unlink(missing_ok=True)
    yield partial
    if target.is_dir():  # POSIX renames over files and empty folders only
        shutil.rmtree(target)
    partial.replace(target)


def check_writable(path: str, key: str) -> None:
    """Refuse a path that no file could be written to.

    Raises:
        ConfigError: one line that begins with `key`.
    """
    check_path(path, key)
    target = Path(path).absolute()
    if target.is_dir():
        raise ConfigError(f"{key}: {path} is a folder, allowed: a file's path")
    if not target.parent.is_dir():
        raise ConfigError(f"{key}: found no folder {target.parent}, allowed: an existing one")
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise ConfigError(f"{key}: {path} cannot be written, allowed: a path that can")


def write_text(target: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(target) as partial:
        partial.write_text(text, encoding="utf-8")
