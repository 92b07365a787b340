"""The files of a run folder, read once and checked: whoever reads them finds the right types."""

import json
from pathlib import Path
from typing import Annotated, Any

import yaml
from annotated_types import Len
from pydantic import BaseModel, ConfigDict, ValidationError

from pipelines.config.schema import ConfigError
from pipelines.config.text import parse_yaml

WRITTEN_BY_RUN = "allowed: a folder written by ray-unlearn run"


class Record(BaseModel):
    """A JSON mapping of schema 1. Another version may have written keys that this one lacks."""

    model_config = ConfigDict(extra="allow", strict=True)


class SetRecord(Record):
    """What a manifest says of one set."""

    rows: int | None = None
    digest: str | None = None


class EarlierRun(Record):
    """What a manifest says of a run before it: where it lies, and the digest of its manifest."""

    run: str
    manifest: str
    model: str | None = None
    created: str | None = None
    verdict: str | None = None


class Request(Record):
    """What a manifest says of its deletion request. `storage.chain` has the meaning of each key."""

    number: int
    earlier: list[EarlierRun]
    rows: list[str]


class Manifest(Record):
    """manifest.json, as far as it is read."""

    status: str | None = None
    purpose: str | None = None
    created: str | None = None
    seed: int | None = None
    python: str | None = None
    git_commit: str | None = None
    sets: dict[str, SetRecord] | None = None
    model: dict[str, str | None] | None = None
    request: Request | None = None
    verdict: str | None = None
    strengths: list[dict[str, float]] | None = None
    cost: dict[str, Any] | None = None
    mlflow: dict[str, Any] | None = None
    versions: dict[str, str | None] | None = None
    machine: dict[str, str | int | None] | None = None
    files: dict[str, str] | None = None


class Scores(Record):
    """scores.json."""

    models: dict[str, dict[str, float | None] | None]
    cost: dict[str, float | None] | None = None
    versions: dict[str, int] | None = None
    oracle_spread: dict[str, float] = {}
    tokens: dict[str, list[float]] = {}
    rows: dict[str, int] = {}
    intervals: dict[str, dict[str, Annotated[list[float], Len(2, 2)]]] = {}


def read_bytes(path: Path) -> bytes:
    """Read a file of a run.

    Raises:
        ConfigError: the file is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        found = f"cannot be read ({type(error).__name__})"
        if isinstance(error, FileNotFoundError):
            found = "not found"
        raise ConfigError(f"{path}: {found}; {WRITTEN_BY_RUN}") from error


def read_text(path: Path) -> str:
    """Read a text file of a run.

    Raises:
        ConfigError: the file is missing or is no text.
    """
    return _decoded(read_bytes(path), str(path))


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"cannot be read ({type(error).__name__})"
        raise ConfigError(f"{where}: {found}; {WRITTEN_BY_RUN}") from error


def read_json(path: Path, record: type[Record] = Manifest) -> dict[str, Any]:
    """Read a JSON mapping of schema 1 from a file, like `parse_record`."""
    return parse_record(read_bytes(path), str(path), record)


def parse_record(text: bytes, where: str, record: type[Record] = Manifest) -> dict[str, Any]:
    """Parse a JSON mapping of schema 1. NaN and Infinity, which no run writes, become null.

    Raises:
        ConfigError: it is not what `ray-unlearn run` writes. The message begins with `where`.
    """
    words = _decoded(text, where)
    try:
        content = json.loads(words, parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, too
        raise ConfigError(f"{where}: not JSON ({error}); {WRITTEN_BY_RUN}") from None
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != 1:
        raise ConfigError(f"{where}: schema: found {schema!r}, allowed: 1")
    try:
        record.model_validate(content)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        found = json.dumps(fault["input"])[:80]
        raise ConfigError(f"{where}: {key}: found {found}, {fault['msg'].lower()}") from None
    return content


def parse_config(text: bytes, where: str) -> dict[str, Any]:
    """Parse a run's config.yaml, of this version or another.

    Raises:
        ConfigError: it is not what `ray-unlearn run` writes. The message begins with `where`.
    """
    try:
        content = parse_yaml(_decoded(text, where))
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{where}: not YAML ({reason}); {WRITTEN_BY_RUN}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: found no mapping of keys; {WRITTEN_BY_RUN}")
    return content
