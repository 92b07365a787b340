"""The chain of deletion requests: a run on the model that another run has left.

A run's manifest has an entry `request`:

    number   1 for a run on any other model, else one more than that of the run that left the model
    earlier  the runs before it, the first one first: where each lies, the model that it began with,
             when it began, its verdict, and the digest of its manifest
    rows     a hash of each forget row's id, sorted

A manifest has the digests of all its run's files. So the digests of manifests tie the models of all
earlier runs to the last one's manifest, and a copy of that one shows every change.

An id can be guessed, as `anna-birthplace`, and a hash of it would confirm the guess to everybody who
reads a manifest. The hashes are therefore made with a random key (HMAC, RFC 2104), which lies beside
the manifest in a file that is neither sealed nor named in it.
"""

import hmac
import secrets
from pathlib import Path
from typing import Any

from pipelines.config.schema import ConfigError
from pipelines.storage.atomic import replacing
from pipelines.storage.records import parse_config, read_bytes, read_json
from pipelines.storage.seal import (
    MANIFEST,
    MODEL,
    REQUEST_KEY,
    changes,
    file_digests,
    manifest_digest,
    top_of,
)


def earlier_runs(model: str) -> list[dict[str, Any]]:
    """Return the entry `earlier` of a run on this model, empty for a model that no run has left.

    Raises:
        ConfigError: the run that left it is not complete, or a file of it is broken.
    """
    parent = _run_that_left(model)
    if parent is None:
        return []
    folder, manifest = parent
    path = folder / "config.yaml"
    output_dir = parse_config(read_bytes(path), str(path)).get("output_dir")
    # A run on an object store has been copied for this one, and the copy may go.
    is_stored = isinstance(output_dir, str) and "://" in output_dir
    record = {
        "run": output_dir if is_stored else str(folder),
        "manifest": manifest_digest(manifest),
        "model": (manifest.get("model") or {}).get("path"),
        "created": manifest.get("created"),
        "verdict": manifest.get("verdict"),
    }
    return [*(manifest.get("request") or {}).get("earlier", []), record]


def check_parent(model: str) -> None:
    """Refuse a model of an earlier run that is not the one which that run has sealed.

    Raises:
        ConfigError: as `earlier_runs`, or a file of the model was changed, removed or added.
    """
    parent = _run_that_left(model)
    if parent is None:
        return
    folder, manifest = parent
    sealed = {name: digest for name, digest in manifest["files"].items() if top_of(name) == MODEL}
    lines = changes(sealed, file_digests(folder, MODEL))
    if lines:
        raise ConfigError(
            f"model.path: {model} is not as its run has sealed it ({lines[0]}); "
            f"allowed: the files that {folder / MANIFEST} names, unchanged"
        )


def _run_that_left(model: str) -> tuple[Path, dict[str, Any]] | None:
    """Return the folder and the manifest of the run whose results a model is one of."""
    path = Path(model).resolve()
    folder = path.parent
    names = (MANIFEST, "config.yaml")
    if path.name != MODEL or not all((folder / name).is_file() for name in names):
        return None
    manifest = read_json(folder / MANIFEST)
    if manifest.get("purpose") != "run":
        return None
    if manifest.get("status") != "complete" or not manifest.get("files"):
        raise ConfigError(
            f"model.path: {model} is of a run that is not complete; "
            "allowed: the model of a complete run (the same command continues it), or another model"
        )
    return folder, manifest


def write_request_key(folder: Path) -> bytes:
    """Write a new key for the hashes of a request, which only its user can read, and return it."""
    key = secrets.token_bytes(32)
    with replacing(folder / REQUEST_KEY) as partial:
        partial.touch(mode=0o600)
        partial.write_text(key.hex(), encoding="utf-8")
    return key


def hash_of_id(row_id: str, key: bytes) -> str:
    """Return the hash of a row's id that a manifest holds, HMAC-SHA256 in hexadecimal digits."""
    return hmac.digest(key, row_id.encode(), "sha256").hex()
