"""Atomic writes: a file or folder gets its name only when it is complete."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


def write_text(target: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(target) as partial:
        partial.write_text(text, encoding="utf-8")
