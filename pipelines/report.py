"""The page of a run: what was asked, whether it was forgotten, at what cost, and what the page does not prove.

`report.html` is a pure function of four files in the run folder (config.yaml, scores.json, losses.jsonl,
manifest.json), so it can be rebuilt and comes out the same, byte for byte. It holds no text of the data and asks no
other host for anything. The verdict is computed from the scores alone; as in open-unlearning (locuslab) its yardstick
is closeness to the retrain oracle, not the lowest score. Python computes, the words are in `report.html.jinja`.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jinja2 import Environment, StrictUndefined

from pipelines.config import ConfigError, UnlearnConfig
from pipelines.config_file import load_config
from pipelines.curves import loss_curves, relearn_curve

MIN_GAP = 0.02  # The original must differ from the target by this much, or a score has nothing to say about forgetting.
FORGOTTEN_SHARE = (
    2 / 3
)  # Of the scores that say something, this share must be nearer to the target than to the original.
PARTLY_SHARE = 1 / 3  # Below this share nothing worth the name was forgotten.
OVERSHOOT = 0.10  # Further than this beyond the target, on the side away from the original, is a tell-tale of its own.
OVERSHOOT_SHARE = 1 / 4  # This share of overshooting scores makes the verdict: too many to be chance.
KEPT_SHARE = 0.95  # A score of what should stay that falls under this share of the original's is a cost.
STILL_THERE = 0.90  # With nothing to compare with: scores above this share of the original's mean nothing happened.
CHANCE = 0.5  # AUC of a membership attack that cannot tell.

# The scores the verdict counts. Loss and perplexity only repeat probability; mia.reference contains the oracle itself.
FORGET_SCORES = (
    *(f"mia.{attack}" for attack in ("min_k", "min_k_plus_plus", "loss", "zlib")),
    *(f"forget.{metric}" for metric in ("extraction_strength", "exact_memorization", "truth_ratio")),
    *(
        f"forget.{metric}{words}"
        for metric in ("probability", "rouge", "fact_recall")
        for words in ("", "_paraphrased")
    ),
)
CLASS_SCORES = ("forget.accuracy", "mia_efficacy")  # those of a classifier
HIGHER_IS_FORGOTTEN = ("forget.truth_ratio", "mia_efficacy")  # In all other scores more means that more is remembered.
# While one of these is nearer to the original, nothing counts as forgotten: ROUGE and probability are easy to fool.
DECISIVE = {
    "forget.fact_recall": "fact recall",
    "forget.extraction_strength": "extraction strength",
    "mia.min_k": "the min-k attack",
    "forget.accuracy": "accuracy",
}
KEEP_SCORES = {
    "retain.accuracy": "the retained rows' accuracy",
    "general.accuracy": "the accuracy on unseen rows",
    "retain.probability": "the retained answers' probability",
    "general.probability": "general knowledge",
    "retain.probability_paraphrased": "the paraphrased retained answers' probability",
    "retain.rouge": "the retained answers' wording",
    "general.rouge": "the general answers' wording",
    "utility.probability": "the utility text's probability",
    "model_utility": "model utility",
}
ALWAYS_NAMED = ("retain.accuracy", "general.accuracy", "retain.probability", "general.probability")
RULE = {"min_gap": MIN_GAP, "forgotten": FORGOTTEN_SHARE, "partly": PARTLY_SHARE, "kept": KEPT_SHARE} | {
    "overshoot": OVERSHOOT,
    "overshoot_share": OVERSHOOT_SHARE,
}

RUN_FILES = ("config.yaml", "scores.json", "losses.jsonl", "manifest.json")  # what the page is made from
KEPT_SETS = ("retain", "general", "utility")
COST_KEYS = ("solve_s", "train_s", "evaluate_s", "tokens", "tokens_per_s", "peak_memory_bytes", "num_workers")
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

Entry = Mapping[str, float | None]
Models = Mapping[str, Entry | None]
Level = Literal["forgotten", "costly", "partly", "over_forgotten", "not_forgotten", "undecided"]


class Verdict(NamedTuple):
    """What the scores say, as a level for colours and gates, and as one sentence for readers."""

    level: Level
    sentence: str


class Forgetting(NamedTuple):
    """Counts over FORGET_SCORES: with a target, of which telling, nearer to the target, and beyond it."""

    measured: int
    telling: int
    nearer: int
    beyond: int
    missed: list[str]


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
    text = resources.files("pipelines").joinpath("report.html.jinja").read_text(encoding="utf-8")
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(text)
    page = template.render(number=format_number, ordered=_ordered, **_view(run))
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def read_run(run_dir: Path) -> Run:
    """Read a run folder. Only a run of no steps (`train.steps=0`) may lack losses.jsonl."""
    config_text = _read(run_dir / "config.yaml")
    config = load_config(str(run_dir / "config.yaml"))
    scores, manifest = read_json(run_dir / "scores.json"), read_json(run_dir / "manifest.json")
    models = scores.get("models")
    if not isinstance(models, dict) or not {"before", "after"} <= models.keys():
        raise ConfigError(
            f"{run_dir / 'scores.json'}: models: found no 'before' and 'after', allowed: both, and oracle"
        )
    path = run_dir / "losses.jsonl"
    lines = [] if config.train.steps == 0 and not path.exists() else _read(path).splitlines()
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


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        found = "not found" if isinstance(error, FileNotFoundError) else f"cannot be read ({type(error).__name__})"
        raise ConfigError(f"{path}: {found}; allowed: a folder written by ray-unlearn run") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON mapping of schema 1. NaN and Infinity, which no run writes, become null.

    Raises:
        ConfigError: the file is missing or is not what `ray-unlearn run` writes.
    """
    try:
        content = json.loads(_read(path), parse_constant=lambda _: None)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not JSON ({error}); allowed: a folder written by ray-unlearn run") from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != 1:
        raise ConfigError(f"{path}: schema: found {schema!r}, allowed: 1")
    return content


def verdict(scores: Mapping[str, Any]) -> Verdict:
    """Judge a run from its scores alone (the content of scores.json); the constants are the thresholds.

    With an oracle its scores are the target. Without one, membership attacks should be at chance against the holdout
    set, and the original's `holdout.*` scores stand in for the rest: a weaker verdict, and it says so.
    """
    models: Models = scores["models"]
    before, after, oracle = models["before"] or {}, models["after"] or {}, models.get("oracle") or {}
    pairs = {name: (before.get(name), after.get(name)) for name in KEEP_SCORES}
    kept = {name: new / old for name, (old, new) in pairs.items() if old and new is not None}
    lost = [name for name, share in kept.items() if share < KEPT_SHARE]
    level, head, evidence = _judge(_count(before, after, oracle), before, after, bool(oracle))
    if level == "forgotten" and not kept:
        level, head = "undecided", "Undecided"
    elif level == "forgotten" and lost:
        level, head = "costly", f"Forgotten, but at the cost of {_join([KEEP_SCORES[name] for name in lost])}"
    weaker = "" if oracle else " (no retrained oracle was given, so this verdict is weaker)"
    return Verdict(level, f"{head}{weaker}: {evidence}; {_keep_clause(kept, lost)}.")


def _count(before: Entry, after: Entry, oracle: Entry) -> Forgetting:
    measured = telling = nearer = beyond = 0
    missed: list[str] = []
    for name in (*FORGET_SCORES, *CLASS_SCORES):
        stand_in = CHANCE if name.startswith("mia.") else before.get(name.replace("forget.", "holdout."))
        old, new, aim = before.get(name), after.get(name), oracle.get(name) if oracle else stand_in
        if old is None or new is None or aim is None:
            continue
        measured += 1
        sign = -1 if name in HIGHER_IS_FORGOTTEN else 1
        beyond += sign * new < min(sign * aim, sign * old) - OVERSHOOT
        if abs(old - aim) >= MIN_GAP:
            telling += 1
            is_nearer = abs(new - aim) < abs(new - old)
            nearer += is_nearer
            if name in DECISIVE and not is_nearer:
                missed.append(DECISIVE[name])
    return Forgetting(measured, telling, nearer, beyond, missed)


def _judge(counts: Forgetting, before: Entry, after: Entry, has_oracle: bool) -> tuple[Level, str, str]:
    """Level, first words and evidence, from the forget set alone."""
    target = "the retrained oracle" if has_oracle else "never-seen data"
    if counts.measured == 0:
        return _judge_without_target(before, after)
    if counts.beyond >= OVERSHOOT_SHARE * counts.measured:
        far = f"{counts.beyond} of {counts.measured} forget-set scores lie more than {OVERSHOOT:.2f} beyond those of"
        return "over_forgotten", "Over-forgotten", f"{far} {target}, itself a tell-tale"
    if counts.telling == 0:
        why = "so there was nothing to forget or the scores do not see it"
        return "undecided", "Undecided", f"no forget-set score tells the original from {target}, {why}"
    closer = f"on the forget set the model is closer to {target} than to the original"
    evidence = f"{closer} on {counts.nearer} of {counts.telling} scores"
    if counts.nearer < PARTLY_SHARE * counts.telling:
        return "not_forgotten", "Not forgotten", evidence
    if counts.missed:
        return "partly", "Partly forgotten", f"{evidence}, but not on {_join(counts.missed)}"
    if counts.nearer < FORGOTTEN_SHARE * counts.telling:
        return "partly", "Partly forgotten", evidence
    return "forgotten", "Forgotten", evidence


def _judge_without_target(before: Entry, after: Entry) -> tuple[Level, str, str]:
    names = [
        name
        for name in (*FORGET_SCORES, *CLASS_SCORES)
        if name.startswith("forget.") and name not in HIGHER_IS_FORGOTTEN
    ]
    pairs = [(old, new) for n in names if (old := before.get(n)) is not None and (new := after.get(n)) is not None]
    total = sum(old for old, _ in pairs)
    if total == 0:
        return "undecided", "Undecided", "no score of the forget set was measured before, after and for a target"
    share = sum(new for _, new in pairs) / total
    evidence = f"the forget-set scores stand at {_percent(share)} of the original's on average"
    if share >= STILL_THERE:
        return "not_forgotten", "Not forgotten", evidence
    return "undecided", "Undecided", f"{evidence}, but nothing given says how low is right"


def _keep_clause(kept: Mapping[str, float], lost: Sequence[str]) -> str:
    if not kept:
        return "what it keeps was not measured"
    named = [name for name in KEEP_SCORES if name in kept and (name in ALWAYS_NAMED or name in lost)] or list(kept)[:1]
    return "it keeps " + _join([f"{_percent(kept[name])} of {KEEP_SCORES[name]}" for name in named])


def _percent(share: float) -> str:
    """Rounded down, so that 94.9 % never reads as the 95 % it missed."""
    return f"{math.floor(share * 100 + 1e-9)} %"


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def format_number(value: float | None) -> str:
    """Three digits that count; an absent number is a dash."""
    if value is None:
        return "\u2013"
    if value != 0 and (abs(value) < 0.001 or abs(value) >= 1e6):
        return f"{value:.1e}"
    digits = next((digits for limit, digits in ((1.05, 3), (10, 2), (1000, 1)) if abs(value) < limit), 0)
    return f"{value:,.{digits}f}"


def _ordered(keys: Iterable[str], order: Iterable[str]) -> list[str]:
    """Known keys in the given order, then the others in their own."""
    keys, order = list(keys), list(order)
    return [key for key in order if key in keys] + [key for key in keys if key not in order]


def chance_margin(forget_rows: int, holdout_rows: int) -> float:
    """How far from 0.5 an AUC strays by chance in 95 of 100 cases (Mann and Whitney 1947: variance of U)."""
    return 1.96 * math.sqrt((forget_rows + holdout_rows + 1) / (12 * forget_rows * holdout_rows))


def _view(run: Run) -> dict[str, Any]:
    """All that the template shows, computed; the words are the template's."""
    models = {name: entry for name in ("before", "after", "oracle") if (entry := run.scores["models"].get(name))}
    sets = run.manifest.get("sets") or {}
    rows = {name: entry["rows"] for name, entry in sets.items() if entry.get("rows")}
    scored = {name: min(count, run.config.evaluation.max_rows or count) for name, count in rows.items()}
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
        "relearning": relearn_curve({name: entry for name, entry in models.items() if name != "before"}),
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
    if (group in KEPT_SETS or metric == "model_utility") and metric not in ("loss", "perplexity") and before > 0:
        return math.floor(100 * after / before + 1e-9)
    return None
