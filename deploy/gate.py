"""The gate before a deployment. It refuses a run whose verdict or scores miss the requirements.

The verdict is the report's (`pipelines.evaluation.verdict`), so that the gate and the page agree.
"""

import operator
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from pipelines.config.schema import ConfigError
from pipelines.evaluation.rule import Level
from pipelines.evaluation.verdict import verdict
from pipelines.report.page import read_run

COMPARISONS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
NUMBER = r"-?\d+(\.\d+)?(e-?\d+)?"
REQUIREMENT = re.compile(
    rf"(?P<model>\w+)\.(?P<score>[\w.]+)\s*(?P<sign><=|>=|<|>)\s*(?P<limit>{NUMBER})"
)
ALLOWED = "MODEL.SCORE<=NUMBER, or with >=, < or >, for example after.forget.probability<=0.2"


class Requirement(NamedTuple):
    """A score that must lie on one side of a limit."""

    model: str
    score: str
    sign: str
    limit: float


def parse_requirement(text: str) -> Requirement:
    """Parse a requirement such as `after.forget.probability<=0.2`.

    Raises:
        ConfigError: the text has another form.
    """
    match = REQUIREMENT.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"--require: found '{text}', allowed: {ALLOWED}")
    return Requirement(match["model"], match["score"], match["sign"], float(match["limit"]))


def reasons_to_refuse(
    run_dir: Path, requirements: Sequence[Requirement], levels: Sequence[str]
) -> list[str]:
    """Return one line for each requirement that the run misses, none if it may pass.

    Args:
        run_dir: the folder of a finished run.
        requirements: the limits of scores.
        levels: the verdicts that may pass.

    Raises:
        ConfigError: the run is not finished, or a model, score or verdict does not exist.
    """
    for level in levels:
        if level not in get_args(Level):
            raise ConfigError(f"--verdict: found '{level}', allowed: {', '.join(get_args(Level))}")
    scores = read_run(run_dir).scores
    level, sentence = verdict(scores)
    reasons: list[str] = []
    if level not in levels:
        reasons.append(f"verdict: {level}, required: {' or '.join(levels)} ({sentence})")
    for model, score, sign, limit in requirements:
        value = _score(scores["models"], model, score)
        if value is None or not COMPARISONS[sign](value, limit):
            measured = "not measured" if value is None else value
            reasons.append(f"{model}.{score}: {measured}, required: {sign} {limit:g}")
    return reasons


def _score(models: dict[str, Any], model: str, score: str) -> float | None:
    """Return a score, None if the run could not measure it."""
    entries = {name: entry for name, entry in models.items() if entry}
    if model not in entries:
        raise ConfigError(f"--require: found model '{model}', this run has: {', '.join(entries)}")
    if score not in entries[model]:
        raise ConfigError(
            f"--require: found score '{score}', {model} has: {', '.join(sorted(entries[model]))}"
        )
    return entries[model][score]
