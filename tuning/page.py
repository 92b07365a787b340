"""The page of a search: the trade-off, the pick, and how much each key mattered.

It is a pure function of the search's records, which hold no rows of the sets.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from pipelines.evaluation.metrics.keys import metric_of
from pipelines.report.curves import SOFT, svg
from tuning.record import TrialRecord, as_configured, scores_of
from tuning.score import OF_CLASSES, OWN_WORDS, Constraint, Score, keeps, pareto_front
from tuning.space import to_optuna

BLUE, GREEN, ORANGE, GREY = "#0072b2", "#009e73", "#d55e00", "#b6bcc5"
# Fewest trials that an importance is computed from.
FEWEST = 8
# Most values of a key that are written beside its axis. Of more only both ends are.
WRITTEN = 6


def write_page(
    folder: Path,
    trials: Mapping[int, TrialRecord],
    chosen: int | None,
    constraints: Sequence[Constraint],
    references: Mapping[str, Mapping[str, float | None]],
) -> Path:
    """Write `search.html` into the search's folder, and return its path."""
    scored = scores_of(trials)
    front, configured = pareto_front(scored), as_configured(trials)
    pick = None if chosen is None else trials[chosen]
    trade_off = progress = None
    if scored:
        trade_off = _trade_off(scored, front, {"as configured": configured, "pick": pick})
        progress = _progress(scored, constraints)
    importances: dict[str, list[tuple[str, int]]] = {}
    for name in ("distance", "utility"):
        shares = _importances(trials, name)
        if shares:
            importances[name] = shares
    of_classes = OF_CLASSES[0] in references["before"]
    compared = OF_CLASSES if of_classes else OWN_WORDS
    text = resources.files("tuning").joinpath("search.html.jinja").read_text(encoding="utf-8")
    # With StrictUndefined a name that the template misspells is an error, and no empty place.
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(text).render(
        trials=[trials[number] for number in sorted(trials)],
        front=front,
        chosen=pick,
        configured=configured,
        constraints=list(map(str, constraints)),
        has_oracle="oracle" in references,
        of_classes=of_classes,
        compared=[metric_of(key).label for key in compared],
        fields=Score._fields,
        keys=list(_values_by_key(trials.values())),
        trade_off=trade_off,
        progress=progress,
        importances=importances,
        lines=_parallel(trials, chosen),
    )
    path = folder / "search.html"
    path.write_text(page, encoding="utf-8")
    return path


def _trade_off(
    scored: Mapping[int, Score], front: list[int], named: Mapping[str, TrialRecord | None]
) -> str:
    """Plot every trial as a point, the front as a line, and some trials by name."""

    def utility_and_distance(scores: Iterable[Score]) -> tuple[list[float], list[float]]:
        utilities, distances = [], []
        for score in scores:
            utilities.append(score.utility)
            distances.append(score.distance)
        return utilities, distances

    def draw(axes: Any) -> None:
        axes.scatter(*utility_and_distance(scored.values()), color=GREY, s=22, label="trial")
        line = [scored[number] for number in front]
        axes.plot(*utility_and_distance(line), color=BLUE, marker="o", label="front")
        for (label, trial), colour in zip(named.items(), (ORANGE, GREEN), strict=True):
            if trial is not None and trial.score is not None:
                point = utility_and_distance([trial.score])
                axes.scatter(*point, color=colour, s=70, zorder=5, marker="D", label=label)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("distance (0: never saw it)", color=SOFT)
        axes.legend(frameon=False, labelcolor=SOFT)

    return svg(draw, size=(6.6, 3.6), x_label="utility (1: as before)")


def best_so_far(scored: Mapping[int, Score], constraints: Sequence[Constraint]) -> list[float]:
    """Return for each trial the least distance so far among those that meet all constraints.

    It is in order of the trials' numbers, and NaN before the first such trial.
    """
    best = math.nan
    line: list[float] = []
    for _, score in sorted(scored.items()):
        # Written with `not`, as every comparison with NaN is false.
        if keeps(score, constraints) and not score.distance >= best:
            best = score.distance
        line.append(best)
    return line


def _progress(scored: Mapping[int, Score], constraints: Sequence[Constraint]) -> str:
    """Plot the least distance so far by trial."""

    def draw(axes: Any) -> None:
        axes.step(sorted(scored), best_so_far(scored, constraints), where="post", color=BLUE)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("least distance so far", color=SOFT)

    return svg(draw, size=(4.6, 2.6), x_label="trial")


def _importances(trials: Mapping[int, TrialRecord], name: str) -> list[tuple[str, int]]:
    """Return the share of a score's variance that each key explains, in percent, largest first.

    It is computed by fANOVA (Hutter et al. 2014), and empty for too few trials.
    """
    import optuna
    from optuna.distributions import (
        BaseDistribution,
        CategoricalChoiceType,
        CategoricalDistribution,
        FloatDistribution,
    )

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions: dict[str, BaseDistribution] = {}
    for key, values in _values_by_key(trials.values()).items():
        distinct: list[CategoricalChoiceType] = []
        for value in map(to_optuna, values):
            if value not in distinct:
                distinct.append(value)
        # Few floats are choices, many are draws from a range.
        if len(distinct) > 5 and all(isinstance(value, float) for value in distinct):
            floats: list[Any] = distinct
            distributions[key] = FloatDistribution(min(floats), max(floats))
        else:
            distributions[key] = CategoricalDistribution(distinct)
    # The search's own study has two objectives, and fANOVA takes one.
    study = optuna.create_study()
    for trial in trials.values():
        if trial.score is not None and trial.values:
            parameters = {key: to_optuna(value) for key, value in trial.values.items()}
            study.add_trial(
                optuna.trial.create_trial(
                    params=parameters,
                    distributions={key: distributions[key] for key in parameters},
                    value=getattr(trial.score, name),
                )
            )
    # fANOVA splits a variance, and equal scores have none.
    if len(study.trials) < FEWEST or len({trial.value for trial in study.trials}) < 2:
        return []
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return [(key, round(100 * share)) for key, share in shares.items()]


def _values_by_key(trials: Iterable[TrialRecord]) -> dict[str, list[Any]]:
    """Return the values of each searched key, in order of the trials."""
    values: dict[str, list[Any]] = {}
    for trial in trials:
        for key, value in trial.values.items():
            values.setdefault(key, []).append(value)
    return values


def _parallel(trials: Mapping[int, TrialRecord], chosen: int | None) -> str | None:
    """Plot parallel coordinates: a line for each trial across its keys' values.

    A line is the darker the smaller its trial's distance. The pick's is green.
    """
    scored = [trial for trial in trials.values() if trial.score is not None and trial.values]
    heights = {key: _heights(values) for key, values in _values_by_key(scored).items()}
    if len(scored) < 2 or len(heights) < 2:
        return None

    def distance(trial: TrialRecord) -> float:
        assert trial.score is not None
        return trial.score.distance

    def draw(axes: Any) -> None:
        worst = max(map(distance, scored))
        # The pick is drawn last, over the others, and before it the nearest ones.
        for trial in sorted(scored, key=lambda trial: (trial.number == chosen, -distance(trial))):
            points: list[tuple[int, float]] = []
            for x, key in enumerate(heights):
                if key in trial.values:
                    points.append((x, heights[key][str(trial.values[key])]))
            share = 1 - distance(trial) / max(worst, 1e-9)
            look: dict[str, Any] = {"color": BLUE, "alpha": 0.08 + 0.6 * share**2, "linewidth": 1}
            if trial.number == chosen:
                look = {"color": GREEN, "alpha": 1, "linewidth": 2.4}
            axes.plot(*zip(*points, strict=True), **look)
        for x, by_value in enumerate(heights.values()):
            _write_values(axes, x, by_value)
        axes.set_xticks(range(len(heights)), [key.split(".", 1)[1] for key in heights])
        axes.set_yticks([])
        axes.set_xlim(-0.1, len(heights) - 0.6)

    return svg(draw, size=(9.2, 3.4), x_label="")


def _write_values(axes: Any, x: int, heights: Mapping[str, float]) -> None:
    """Write a key's values beside its axis, or only both ends if there are many."""
    written = sorted(heights.items(), key=lambda item: item[1])
    if len(written) > WRITTEN:
        written = [written[0], written[-1]]
    for text, y in written:
        with suppress(ValueError):
            text = f"{float(text):.3g}"
        axes.annotate(
            text, (x, y), textcoords="offset points", xytext=(4, 0), fontsize=7, color=SOFT
        )


def _heights(values: list[Any]) -> dict[str, float]:
    """Return the height of each value of a key, 0 to 1. Numbers are in order of their size."""
    distinct = list({str(value): value for value in values}.values())
    # By their order alone, as one scale would not do for ranks that double and rates over decades.
    if all(isinstance(value, (int, float)) for value in distinct):
        distinct.sort()
    top = max(len(distinct) - 1, 1)
    return {str(value): index / top for index, value in enumerate(distinct)}
