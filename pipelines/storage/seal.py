"""What a run's manifest seals: every result by its digest."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
MODEL = "model"
# Without this key nobody can tell which rows a request's hashes stand for (`storage.chain`). It is
# given to auditors alone, and whoever has the other files can verify them without it.
REQUEST_KEY = "request.key"
# Ray Train reads and writes resume points on the store itself.
CHECKPOINTS = "checkpoints"
NOT_SEALED = (
    "report.html",
    "report.pdf",
    MANIFEST,
    "run.log",
    "serve.log",
    "mlflow.db",
    "mlartifacts",
    CHECKPOINTS,
    REQUEST_KEY,
)
# MLflow may get its records when the run is complete: the manifest's entry of them then changes.
NOT_SEALED_IN_MANIFEST = "mlflow"


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


def file_digests(run_dir: Path, top: str | None = None) -> dict[str, str]:
    """Return the digests of a run folder's sealed results by their paths in it.

    With `top` they are those of its file or folder of that name.
    """
    names = filter(is_sealed, entries_in(run_dir))
    wanted = [name for name in names if top is None or top_of(name) == top]
    return {name: _entry_digest(run_dir / name) for name in wanted}


def changes(sealed: Mapping[str, str], present: Mapping[str, str]) -> list[str]:
    """Return one line per file that was changed, removed or added since it was sealed."""
    lines: list[str] = []
    for name in sorted(sealed.keys() | present.keys()):
        if name not in present:
            lines.append(f"{name}: missing")
        elif name not in sealed:
            lines.append(f"{name}: not in the manifest")
        elif sealed[name] != present[name]:
            lines.append(f"{name}: changed")
    return lines


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256 of what a complete run's manifest says once and for all.

    It is taken of JSON with sorted keys and without white space, less the entry `mlflow`.
    """
    fixed = {key: value for key, value in manifest.items() if key != NOT_SEALED_IN_MANIFEST}
    text = json.dumps(fixed, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of_model(digests: Mapping[str, str]) -> str:
    """Return the SHA-256 over a model folder's configuration and weights, from its files' digests.

    Other files of the folder do not count.
    """
    digest = hashlib.sha256()
    for name in sorted(digests):
        if name == "config.json" or ("/" not in name and name.endswith(".safetensors")):
            digest.update(name.encode())
            digest.update(digests[name].encode())
    return digest.hexdigest()


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
