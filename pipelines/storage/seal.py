"""What a run's manifest seals: every result by its digest."""

import hashlib
import os
from pathlib import Path

MANIFEST = "manifest.json"
# Ray Train reads and writes resume points on the store itself.
CHECKPOINTS = "checkpoints"
NOT_SEALED = (
    "report.html",
    MANIFEST,
    "run.log",
    "serve.log",
    "mlflow.db",
    "mlartifacts",
    CHECKPOINTS,
)


def is_sealed(name: str) -> bool:
    """Return whether the manifest has a digest of a result."""
    return top_of(name) not in NOT_SEALED


def top_of(name: str) -> str:
    """Return the first name of a path."""
    return name.split("/")[0]


def entries_in(folder: Path) -> list[str]:
    """List all that lies below a folder and is no folder itself: files, links, pipes."""
    names: list[str] = []
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_dir():
            names.append(str(path.relative_to(folder)))
    return sorted(names)


def file_digests(run_dir: Path) -> dict[str, str]:
    """Return the digests of a run folder's sealed results by their paths in it."""
    names = filter(is_sealed, entries_in(run_dir))
    return {name: _entry_digest(run_dir / name) for name in names}


def _entry_digest(path: Path) -> str:
    """Return the digest of a file's content, of where a link leads, or of neither.

    A link is not followed: what it leads to may lie elsewhere, and be a whole folder.
    """
    if path.is_symlink():
        return hashlib.sha256(b"link to " + os.fsencode(path.readlink())).hexdigest()
    if not path.is_file():  # a pipe would be read without end
        return hashlib.sha256(b"no file").hexdigest()
    return file_digest(path)


def file_digest(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
