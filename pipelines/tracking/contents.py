"""Read the content of a run folder that MLflow shows."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

LOSSES, TRIALS = "losses.jsonl", "trials.jsonl"
PAGES = ("report.html", "search.html", "best.yaml")


class Contents(NamedTuple):
    """A run folder's content, but for its growing files. A missing file contributes nothing."""

    parameters: dict[str, str]
    datasets: dict[str, dict[str, Any]]
    scores: dict[str, float]
    adapter: Path | None
    alias: str | None
    pages: list[Path]


class Trial(NamedTuple):
    """A trial that has ended. In MLflow it is a run inside the search's run."""

    name: str
    parameters: dict[str, str]
    scores: dict[str, float]
    status: str


def read_contents(folder: Path) -> Contents:
    """Read a run folder, at any point of its run."""
    config, manifest = folder / "config.yaml", _read_json(folder / "manifest.json")
    is_search = manifest.get("purpose") == "tune"
    results = _read_json(folder / "scores.json")
    scores = _numbers("cost", results.get("cost", {}))
    for name, model_scores in results.get("models", {}).items():
        scores |= _numbers(name, model_scores)
    # The last strength in the list is the one that the run chose.
    if results and manifest.get("strengths"):
        scores |= _numbers("solve", manifest["strengths"][-1])
    picked = manifest.get("pick")
    if picked is not None:
        for line in read_lines(folder / TRIALS)[0]:
            if line["number"] == picked:
                scores |= _numbers("pick", line["score"])
    # An adapter is sent once it has been scored, or picked. Until then a restart may replace it.
    is_final = picked is not None if is_search else bool(results)
    adapter = folder / "adapter"
    parameters: dict[str, Any] = {}
    if config.exists():
        parameters = yaml.safe_load(config.read_text(encoding="utf-8"))
    return Contents(
        parameters=flatten(parameters),
        datasets=manifest.get("sets", {}),
        scores=scores,
        adapter=adapter if is_final and adapter.exists() else None,
        alias="champion" if is_search else None,
        pages=[folder / name for name in PAGES if (folder / name).exists()],
    )


def read_trial(line: Mapping[str, Any]) -> Trial:
    """Read a line of `trials.jsonl`."""
    scores = _numbers("trial", line["score"] or {})
    if line["score"] is not None:
        scores |= _numbers("after", line["scores"])
    status = "FAILED" if line["state"] == "failed" else "FINISHED"
    return Trial(f"trial-{line['number']:04d}", flatten(line["values"]), scores, status)


def read_lines(path: Path, start: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Return the JSON lines of a file from byte `start` on, and the byte where they end.

    A line that a killed run left torn is skipped.
    """
    if not path.exists():
        return [], start
    with path.open("rb") as stream:
        stream.seek(start)
        content = stream.read()
    # The last line may still be growing, and is read at the next call.
    length = content.rfind(b"\n") + 1
    entries: list[dict[str, Any]] = []
    for line in content[:length].splitlines():
        # A run that goes on appends to the torn line, so it is in the middle of the file by then.
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries, start + length


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten a nested mapping: `{"train": {"steps": 60}}` becomes `{"train.steps": "60"}`."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat


def _numbers(prefix: str, scores: Mapping[str, float | None]) -> dict[str, float]:
    """Return the scores that are numbers, with the prefix before their names."""
    return {f"{prefix}.{key}": float(value) for key, value in scores.items() if value is not None}


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, empty if there is no file."""
    if not path.exists():
        return {}
    return json.loads(path.read_text(encoding="utf-8"))
