"""The page of a run: its settings, its verdict, its cost, and the limits of its proof.

`report.html` is a pure function of four files in the run folder (config.yaml, scores.json,
losses.jsonl, manifest.json), so it can be rebuilt and comes out the same, byte for byte. It holds
no text of the data and asks no other host for anything. The words of scores are in METRICS, all
others in `page.html.jinja`.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined

from pipelines.config.data import KEPT_SETS
from pipelines.config.load import load_config
from pipelines.config.schema import ConfigError, UnlearnConfig
from pipelines.evaluation.metrics.distance import MARGIN
from pipelines.evaluation.metrics.keys import RESCORINGS, metric_of
from pipelines.evaluation.metrics.membership import chance_gap
from pipelines.evaluation.metrics.metric import Metric
from pipelines.evaluation.metrics.relearning import RELEARNINGS
from pipelines.evaluation.metrics.table import METRICS
from pipelines.evaluation.rule import RULE
from pipelines.evaluation.traces import Entry
from pipelines.evaluation.verdict import TOKEN_DISTANCE, verdict
from pipelines.report.curves import LOWEST, loss_curves, relearn_curve, token_scatter
from pipelines.storage.holders import holders
from pipelines.storage.records import Scores, read_json, read_text

# The files that the page is made from.
RUN_FILES = ("config.yaml", "scores.json", "losses.jsonl", "manifest.json")


class Run(NamedTuple):
    """The content of a run folder."""

    config: UnlearnConfig
    config_text: str
    scores: dict[str, Any]
    losses: list[dict[str, Any]]
    torn_lines: int
    manifest: dict[str, Any]


class Row(NamedTuple):
    """A score of all models.

    `group` precedes the metric in the score's key, and is empty for a score of no set. `reached` is
    the percentage of the way to the oracle, or of the score before. `spread` is the difference
    between the highest and the lowest of several oracles, `interval` where the score after
    unlearning lies with other rows like these.
    """

    group: str
    metric: Metric
    values: dict[str, float | None]
    reached: int | None
    spread: float | None
    interval: Sequence[float] | None


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run folder, from the folder's own files.

    Raises:
        ConfigError: a file is missing or is not what `ray-unlearn run` writes.
    """
    run = read_run(run_dir)
    template = resources.files("pipelines.report").joinpath("page.html.jinja")
    # With StrictUndefined a name that the template misspells is an error, and no empty place.
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(template.read_text(encoding="utf-8"))
    path = run_dir / "report.html"
    path.write_text(page.render(number=format_number, **_view(run)), encoding="utf-8")
    return path


def read_run(run_dir: Path) -> Run:
    """Read a run folder. Only a run of no steps (`train.steps=0`) may lack losses.jsonl."""
    config_text = read_text(run_dir / "config.yaml")
    config = load_config(str(run_dir / "config.yaml"))
    scores = read_json(run_dir / "scores.json", Scores)
    manifest = read_json(run_dir / "manifest.json")
    if not {"before", "after"} <= scores["models"].keys():
        raise ConfigError(
            f"{run_dir / 'scores.json'}: models: found no 'before' and 'after', "
            "allowed: both, and oracle"
        )
    path = run_dir / "losses.jsonl"
    lines: list[str] = []
    if config.train.steps or path.exists():
        lines = read_text(path).splitlines()
    losses, torn_lines = read_losses(lines)
    return Run(config, config_text, scores, losses, torn_lines, manifest)


def read_losses(lines: Iterable[str]) -> tuple[list[dict[str, Any]], int]:
    """Return one entry for each step, in order, and the number of unreadable lines."""
    # A run that was killed and restarted repeats steps, of which the last counts, and may leave a
    # torn line.
    steps: dict[int, dict[str, Any]] = {}
    torn_lines = 0
    for line in lines:
        try:
            # A loss that was not a number becomes None.
            entry = json.loads(line, parse_constant=lambda _: None)
            if not all(isinstance(value, int | float | None) for value in entry.values()):
                raise ValueError("a loss is a number")
            steps[int(entry["step"])] = entry
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            torn_lines += bool(line.strip())
    return [steps[step] for step in sorted(steps)], torn_lines


def format_number(value: float | None) -> str:
    """Write a number with three significant digits, and None as a dash."""
    if value is None:
        return "\u2013"
    size = abs(value)
    if value != 0 and (size < 0.001 or size >= 1e6):
        return f"{value:.1e}"
    for limit, digits in ((1.05, 3), (10, 2), (1000, 1)):
        if size < limit:
            return f"{value:.{digits}f}"
    return f"{value:,.0f}"


def chance_margin(forget_rows: int, holdout_rows: int) -> float:
    """Return the distance from 0.5 that an AUC stays within by chance in 95 of 100 cases."""
    return 1.96 * chance_gap(forget_rows, holdout_rows)


def _view(run: Run) -> dict[str, Any]:
    """Compute the template's variables."""
    models: dict[str, Entry] = {}
    for name in ("before", "after", "oracle"):
        if run.scores["models"].get(name):
            models[name] = run.scores["models"][name]
    sets = run.manifest.get("sets") or {}
    rows = {name: entry["rows"] for name, entry in sets.items() if entry.get("rows")}
    margin = None
    if {"forget", "holdout"} <= rows.keys():
        # Chance depends on the rows that were scored, and not on those that the sets have.
        most = run.config.evaluation.max_rows or max(rows.values())
        margin = chance_margin(min(rows["forget"], most), min(rows["holdout"], most))
    intervals = run.scores.get("intervals", {}).get("after", {})
    scores = _scores(models, run.scores.get("oracle_spread", {}), intervals)
    return {
        "cfg": run.config,
        "config_text": run.config_text,
        # The template reads a key that a run did not write as None.
        "manifest": defaultdict(lambda: None, run.manifest),
        "cost": defaultdict(lambda: None, run.scores.get("cost") or {}),
        "holders": holders(run.config, run.manifest),
        "sets": sets,
        "rows": rows,
        "models": list(models),
        "scores": scores,
        "has_intervals": bool(intervals),
        "rescorings": RESCORINGS,
        "decisive": [m.decisive for m in METRICS if m.decisive and m.key("forget") in scores],
        "verdict": verdict(run.scores),
        "floor": models.get("oracle", {}).get(TOKEN_DISTANCE),
        "rule": RULE,
        "curves": loss_curves(run.losses),
        "relearnings": RELEARNINGS,
        "relearn_curves": {by.name: relearn_curve(models, by) for by in RELEARNINGS},
        "lowest": LOWEST,
        "margin_nats": MARGIN,
        "tokens": token_scatter(run.scores.get("tokens", {})),
        "steps": len(run.losses),
        "torn_lines": run.torn_lines,
        "margin": margin,
    }


def _scores(
    models: Mapping[str, Entry],
    spread: Mapping[str, float],
    intervals: Mapping[str, Sequence[float]],
) -> dict[str, Row]:
    """Return each score by its key in the order of METRICS, with scores of no metric last."""
    scores: dict[str, Row] = {}
    for key in dict.fromkeys(chain(*models.values())):
        group, dot, name = key.partition(".")
        if not dot:
            group, name = "", key
        try:
            metric = metric_of(key)
        except KeyError:
            # Another version has written this score. As a distance it is drawn on no axis.
            metric = Metric(name=name, label=name.replace("_", " "), help="", unit="distance")
        values = {model: entry.get(key) for model, entry in models.items()}
        reached = _reached(group, metric, values)
        scores[key] = Row(group, metric, values, reached, spread.get(key), intervals.get(key))

    def position(score: tuple[str, Row]) -> int:
        metric = score[1].metric
        return METRICS.index(metric) if metric in METRICS else len(METRICS)

    return dict(sorted(scores.items(), key=position))


def _reached(group: str, metric: Metric, values: Entry) -> int | None:
    """Return the percentage of the way to the oracle or of the score before, if that applies."""
    before, after, oracle = values.get("before"), values.get("after"), values.get("oracle")
    if before is None or after is None:
        return None
    if group in ("forget", "mia") and oracle is not None and abs(before - oracle) >= RULE.min_gap:
        return round(100 * (before - after) / (before - oracle))
    # Rounded down, so that 100 means that nothing was lost. The 1e-9 is for a product such as
    # 0.29 * 100, which floating point puts a hair below 29.
    is_kept = metric.unit == "share" and (group in KEPT_SETS or group in metric.kept)
    if is_kept and before > 0:
        return math.floor(100 * after / before + 1e-9)
    return None
