"""Files and folders that have their name only once they are complete."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a hidden path beside `target` to write to. It takes the place of `target` when the block ends.

    Where the block raises an error, or the process dies in it, `target` stays as it was. The next attempt removes what
    is left of the hidden file or folder.
    """
    partial = target.with_name(f".{target.name}{PARTIAL}")
    _remove(partial)
    yield partial
    if target.is_dir():  # rename replaces files only
        shutil.rmtree(target)
    partial.replace(target)


def write_text(target: Path, text: str) -> None:
    """Write a text file, at once."""
    with replacing(target) as partial:
        partial.write_text(text, encoding="utf-8")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
