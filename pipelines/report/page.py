"""The page of a run: what was asked, whether it was forgotten, at what cost, and what the page does not prove.

`report.html` is a pure function of four files in the run folder (config.yaml, scores.json, losses.jsonl,
manifest.json), so it can be rebuilt and comes out the same, byte for byte. It holds no text of the data and asks no
other host for anything. The verdict is `pipelines.evaluation.verdict`'s. Python computes; the words are in
`page.html.jinja`.
"""

import json
import math
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined

from pipelines.config.load import load_config
from pipelines.config.schema import ConfigError, UnlearnConfig
from pipelines.evaluation.metrics.membership import chance_gap
from pipelines.evaluation.verdict import MIN_GAP, RULE, Entry, verdict
from pipelines.report.curves import loss_curves, relearn_curve
from pipelines.storage.run_folder import read_json, read_text

RUN_FILES = (
    "config.yaml",
    "scores.json",
    "losses.jsonl",
    "manifest.json",
)  # what the page is made from
KEPT_SETS = ("retain", "general", "utility")
COST_KEYS = (
    "solve_s",
    "train_s",
    "evaluate_s",
    "tokens",
    "tokens_per_s",
    "peak_memory_bytes",
    "num_workers",
)
MANIFEST_KEYS = (
    "created",
    "versions",
    "python",
    "machine",
    "seed",
    "model",
    "mlflow",
    "git_commit",
    "files",
    "strengths",
)


class Run(NamedTuple):
    """What the page is made from."""

    config: UnlearnConfig
    config_text: str
    scores: dict[str, Any]
    losses: list[dict[str, Any]]
    torn_lines: int
    manifest: dict[str, Any]


class Row(NamedTuple):
    """One score of all models. `reached`: percent of the way to the oracle, or of what was there before."""

    values: dict[str, float | None]
    reached: int | None


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run folder, from the folder's own files.

    Raises:
        ConfigError: a file is missing or is not what `ray-unlearn run` writes.
    """
    run = read_run(run_dir)
    text = (
        resources.files("pipelines.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    )
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(text)
    page = template.render(number=format_number, ordered=_ordered, **_view(run))
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def read_run(run_dir: Path) -> Run:
    """Read a run folder. Only a run of no steps (`train.steps=0`) may lack losses.jsonl."""
    config_text = read_text(run_dir / "config.yaml")
    config = load_config(str(run_dir / "config.yaml"))
    scores, manifest = read_json(run_dir / "scores.json"), read_json(run_dir / "manifest.json")
    models = scores.get("models")
    if not isinstance(models, dict) or not {"before", "after"} <= models.keys():
        raise ConfigError(
            f"{run_dir / 'scores.json'}: models: found no 'before' and 'after', allowed: both, and oracle"
        )
    path = run_dir / "losses.jsonl"
    lines = [] if config.train.steps == 0 and not path.exists() else read_text(path).splitlines()
    losses, torn_lines = read_losses(lines)
    return Run(config, config_text, scores, losses, torn_lines, manifest)


def read_losses(lines: Iterable[str]) -> tuple[list[dict[str, Any]], int]:
    """One entry a step, in order, and the number of unreadable lines.

    A run that was killed and restarted repeats steps (the last counts) and may leave a line torn in the middle.
    """
    steps: dict[int, dict[str, Any]] = {}
    torn_lines = 0
    for line in lines:
        try:
            entry = json.loads(line, parse_constant=lambda _: None)
            steps[int(entry["step"])] = entry
        except (ValueError, KeyError, TypeError):
            torn_lines += bool(line.strip())
    return [steps[step] for step in sorted(steps)], torn_lines


def format_number(value: float | None) -> str:
    """Three digits that count; an absent number is a dash."""
    if value is None:
        return "\u2013"
    if value != 0 and (abs(value) < 0.001 or abs(value) >= 1e6):
        return f"{value:.1e}"
    digits = next(
        (digits for limit, digits in ((1.05, 3), (10, 2), (1000, 1)) if abs(value) < limit), 0
    )
    return f"{value:,.{digits}f}"


def _ordered(keys: Iterable[str], order: Iterable[str]) -> list[str]:
    """Known keys in the given order, then the others in their own."""
    keys, order = list(keys), list(order)
    return [key for key in order if key in keys] + [key for key in keys if key not in order]


def chance_margin(forget_rows: int, holdout_rows: int) -> float:
    """How far from 0.5 an AUC strays by chance in 95 of 100 cases."""
    return 1.96 * chance_gap(forget_rows, holdout_rows)


def _view(run: Run) -> dict[str, Any]:
    """All that the template shows, computed; the words are the template's."""
    models = {
        name: entry
        for name in ("before", "after", "oracle")
        if (entry := run.scores["models"].get(name))
    }
    sets = run.manifest.get("sets") or {}
    rows = {name: entry["rows"] for name, entry in sets.items() if entry.get("rows")}
    scored = {
        name: min(count, run.config.evaluation.max_rows or count) for name, count in rows.items()
    }
    return {
        "cfg": run.config,
        "config_text": run.config_text,
        "manifest": dict.fromkeys(MANIFEST_KEYS) | run.manifest,
        "sets": sets,
        "rows": rows,
        "models": list(models),
        "groups": _groups(models),
        "verdict": verdict(run.scores),
        "rule": RULE,
        "cost": dict.fromkeys(COST_KEYS) | (run.scores.get("cost") or {}),
        "curves": loss_curves(run.losses),
        "relearning": relearn_curve(
            {name: entry for name, entry in models.items() if name != "before"}
        ),
        "steps": len(run.losses),
        "torn_lines": run.torn_lines,
        "margin": chance_margin(scored["forget"], scored["holdout"])
        if {"forget", "holdout"} <= scored.keys()
        else None,
    }


def _groups(models: Mapping[str, Entry]) -> dict[str, dict[str, Row]]:
    """Scores by what stands before the first dot of their key ('' for none), then by the rest of the key."""
    groups: dict[str, dict[str, Row]] = {}
    for key in dict.fromkeys(key for entry in models.values() for key in entry):
        group, _, metric = key.rpartition(".") if key.count(".") < 2 else key.partition(".")
        values = {name: entry.get(key) for name, entry in models.items()}
        groups.setdefault(group, {})[metric] = Row(values, _reached(group, metric, values))
    return groups


def _reached(group: str, metric: str, values: Entry) -> int | None:
    before, after, oracle = (values.get(name) for name in ("before", "after", "oracle"))
    if before is None or after is None:
        return None
    if group in ("forget", "mia") and oracle is not None and abs(before - oracle) >= MIN_GAP:
        return round(100 * (before - after) / (before - oracle))
    if (
        (group in KEPT_SETS or metric == "model_utility")
        and metric not in ("loss", "perplexity")
        and before > 0
    ):
        return math.floor(100 * after / before + 1e-9)
    return None
