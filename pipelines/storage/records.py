"""The JSON files of a run folder, read once and checked: whoever reads them finds the right types."""

import json
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Len
from pydantic import BaseModel, ConfigDict, ValidationError

from pipelines.config.schema import ConfigError

WRITTEN_BY_RUN = "allowed: a folder written by ray-unlearn run"


class Record(BaseModel):
    """A JSON mapping of schema 1. Another version may have written keys that this one lacks."""

    model_config = ConfigDict(extra="allow", strict=True)


class SetRecord(Record):
    """What a manifest says of one set."""

    rows: int | None = None
    digest: str | None = None


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


def read_text(path: Path) -> str:
    """Read a text file of a run.

    Raises:
        ConfigError: the file is missing or is no text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        found = f"cannot be read ({type(error).__name__})"
        if isinstance(error, FileNotFoundError):
            found = "not found"
        raise ConfigError(f"{path}: {found}; {WRITTEN_BY_RUN}") from error


def read_json(path: Path, record: type[Record] = Manifest) -> dict[str, Any]:
    """Read a JSON mapping of schema 1. NaN and Infinity, which no run writes, become null.

    Raises:
        ConfigError: the file is missing or is not what `ray-unlearn run` writes.
    """
    try:
        content = json.loads(read_text(path), parse_constant=lambda _: None)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON ({error}); {WRITTEN_BY_RUN}") from None
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != 1:
        raise ConfigError(f"{path}: schema: found {schema!r}, allowed: 1")
    try:
        record.model_validate(content)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        found = json.dumps(fault["input"])[:80]
        raise ConfigError(f"{path}: {key}: found {found}, {fault['msg'].lower()}") from None
    return content
