"""What a run folder holds that MLflow is to show: parameters, data sets, steps, scores, adapter, pages, trials."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

LOSSES, TRIALS = "losses.jsonl", "trials.jsonl"
PAGES = ("report.html", "search.html", "best.yaml")


class Contents(NamedTuple):
    """All of a run folder but its growing files. A file that is not written yet contributes nothing."""

    parameters: dict[str, str]
    datasets: dict[str, dict[str, Any]]
    scores: dict[str, float]
    adapter: Path | None
    alias: str | None
    pages: list[Path]


class Trial(NamedTuple):
    """A trial that has ended, a run of its own inside the search's."""

    name: str
    parameters: dict[str, str]
    scores: dict[str, float]
    status: str


def read_contents(folder: Path) -> Contents:
    """Read a run folder, at whatever point its run is."""
    config, manifest = folder / "config.yaml", _read_json(folder / "manifest.json")
    is_search = manifest.get("purpose") == "tune"
    results = _read_json(folder / "scores.json")
    scores = _numbers("cost", results.get("cost", {}))
    for name, model_scores in results.get("models", {}).items():
        scores |= _numbers(name, model_scores)
    if results and manifest.get("strengths"):
        scores |= _numbers("solve", manifest["strengths"][-1])  # the chosen one
    picked = manifest.get("pick")
    if picked is not None:
        for line in read_lines(folder / TRIALS)[0]:
            if line["number"] == picked:
                scores |= _numbers("pick", line["score"])
    # An adapter counts once it has been scored, or picked: until then a restart may replace it.
    is_final = (folder / "adapter").exists() and (
        picked is not None if is_search else bool(results)
    )
    parameters = yaml.safe_load(config.read_text(encoding="utf-8")) if config.exists() else {}
    return Contents(
        parameters=flatten(parameters),
        datasets=manifest.get("sets", {}),
        scores=scores,
        adapter=folder / "adapter" if is_final else None,
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
    """Read the JSON lines of a file from byte `start` on, and return them with the byte where they end.

    A line that a killed run has torn is left out.
    """
    if not path.exists():
        return [], start
    with path.open("rb") as stream:
        stream.seek(start)
        content = stream.read()
    length = content.rfind(b"\n") + 1
    entries: list[dict[str, Any]] = []
    for line in content[:length].splitlines():
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
    return {f"{prefix}.{key}": float(value) for key, value in scores.items() if value is not None}


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
