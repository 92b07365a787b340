"""The page of a search: the trade-off, the pick, what mattered. A pure function of the search's records; no data."""

from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from pipelines.evaluation.metrics.keys import metric_of
from pipelines.report.curves import SOFT, svg
from tuning.record import TrialRecord, as_configured
from tuning.score import OF_CLASSES, OWN_WORDS, Constraint, Score, pareto_front
from tuning.space import to_optuna

BLUE, GREEN, ORANGE, GREY = "#0072b2", "#009e73", "#d55e00", "#b6bcc5"
FEWEST = 8  # trials that an importance is computed from


def write_page(
    folder: Path,
    trials: Mapping[int, TrialRecord],
    chosen: int | None,
    constraints: Sequence[Constraint],
    references: Mapping[str, Mapping[str, float | None]],
) -> Path:
    """Write `search.html` into the search's folder."""
    scored = {number: own.score for number, own in sorted(trials.items()) if own.score is not None}
    front, configured = pareto_front(scored), as_configured(trials)
    of_classes = OF_CLASSES[0] in references["before"]
    compared = OF_CLASSES if of_classes else OWN_WORDS
    text = resources.files("tuning").joinpath("search.html.jinja").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(text).render(
        trials=[trials[number] for number in sorted(trials)],
        front=front,
        chosen=None if chosen is None else trials[chosen],
        configured=configured,
        constraints=[str(own) for own in constraints],
        has_oracle="oracle" in references,
        of_classes=of_classes,
        compared=[metric_of(key).label for key in compared],
        fields=Score._fields,
        keys=list(dict.fromkeys(key for own in trials.values() for key in own.values)),
        trade_off=_trade_off(
            scored,
            front,
            {"as configured": configured, "pick": None if chosen is None else trials[chosen]},
        )
        if scored
        else None,
        progress=svg(_progress(scored, constraints), size=(4.6, 2.6), x_label="trial")
        if scored
        else None,
        importances={
            name: found for name in ("distance", "utility") if (found := _importances(trials, name))
        },
        lines=_parallel(trials, chosen),
    )
    path = folder / "search.html"
    path.write_text(page, encoding="utf-8")
    return path


def _trade_off(
    scored: Mapping[int, Score], front: list[int], named: Mapping[str, TrialRecord | None]
) -> str:
    """Every trial as a point; the front as a line; some trials by name."""

    def draw(axes: Any) -> None:
        axes.scatter(
            [own.utility for own in scored.values()],
            [own.distance for own in scored.values()],
            color=GREY,
            s=22,
            label="trial",
        )
        line = [scored[number] for number in front]
        axes.plot(
            [own.utility for own in line],
            [own.distance for own in line],
            color=BLUE,
            marker="o",
            label="front",
        )
        for (label, own), colour in zip(named.items(), (ORANGE, GREEN), strict=True):
            if own is not None and own.score is not None:
                place = [own.score.utility], [own.score.distance]
                axes.scatter(*place, color=colour, s=70, zorder=5, marker="D", label=label)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("distance (0: never saw it)", color=SOFT)
        axes.legend(frameon=False, labelcolor=SOFT)

    return svg(draw, size=(6.6, 3.6), x_label="utility (1: as before)")


def best_so_far(scored: Mapping[int, Score], constraints: Sequence[Constraint]) -> list[float]:
    """Least distance among the trials up to each, in order of their numbers, that keep all constraints; NaN before."""
    best, line = float("nan"), []
    for number in sorted(scored):
        own = scored[number]
        if all(constraint.holds(own) for constraint in constraints) and not own.distance >= best:
            best = own.distance
        line.append(best)
    return line


def _progress(
    scored: Mapping[int, Score], constraints: Sequence[Constraint]
) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        axes.step(sorted(scored), best_so_far(scored, constraints), where="post", color=BLUE)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("least distance so far", color=SOFT)

    return draw


def _importances(trials: Mapping[int, TrialRecord], name: str) -> list[tuple[str, int]]:
    """Share of a score's variance that each key explains, in percent (fANOVA: Hutter et al. 2014), largest first."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = _study(trials, name)
    if len(study.trials) < FEWEST or len({own.value for own in study.trials}) < 2:
        return []
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return [
        (key, round(100 * share))
        for key, share in optuna.importance.get_param_importances(
            study, evaluator=evaluator
        ).items()
    ]


def _study(trials: Mapping[int, TrialRecord], name: str) -> Any:
    """The trials that have values, as a study of one score."""
    import optuna

    study = optuna.create_study()
    seen: dict[str, list[Any]] = {}
    for own in trials.values():
        for key, value in own.values.items():
            if to_optuna(value) not in seen.setdefault(key, []):
                seen[key].append(to_optuna(value))
    for own in trials.values():
        if own.score is not None and own.values:
            study.add_trial(
                optuna.trial.create_trial(
                    params={key: to_optuna(value) for key, value in own.values.items()},
                    distributions={key: _distribution(seen[key]) for key in own.values},
                    value=getattr(own.score, name),
                )
            )
    return study


def _distribution(seen: list[Any]) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if all(isinstance(value, float) for value in seen) and len(seen) > 5:
        return FloatDistribution(min(seen), max(seen))
    return CategoricalDistribution(seen)


def _parallel(trials: Mapping[int, TrialRecord], chosen: int | None) -> str | None:
    """Parallel coordinates: a line a trial across the keys' values, the darker the smaller its distance."""
    scored = [own for own in trials.values() if own.score is not None and own.values]
    keys = list(dict.fromkeys(key for own in scored for key in own.values))
    if len(scored) < 2 or len(keys) < 2:
        return None
    places = {
        key: _places([own.values[key] for own in scored if key in own.values]) for key in keys
    }

    def draw(axes: Any) -> None:
        worst = max(own.score.distance for own in scored if own.score)
        for own in sorted(
            scored, key=lambda own: (own.number == chosen, -own.score.distance if own.score else 0)
        ):
            assert own.score is not None
            points = [
                (x, places[key][str(own.values[key])])
                for x, key in enumerate(keys)
                if key in own.values
            ]
            is_pick = own.number == chosen
            share = 1 - own.score.distance / max(worst, 1e-9)
            axes.plot(
                *zip(*points, strict=True),
                color=GREEN if is_pick else BLUE,
                alpha=1 if is_pick else 0.08 + 0.6 * share**2,
                linewidth=2.4 if is_pick else 1,
            )
        for x, key in enumerate(keys):
            ends = sorted(places[key].items(), key=lambda item: item[1])
            shown = ends if len(ends) <= 6 else [ends[0], ends[-1]]
            for text, y in shown:
                axes.annotate(
                    _short(text),
                    (x, y),
                    textcoords="offset points",
                    xytext=(4, 0),
                    fontsize=7,
                    color=SOFT,
                )
        axes.set_xticks(range(len(keys)), [key.split(".", 1)[1] for key in keys])
        axes.set_yticks([])
        axes.set_xlim(-0.1, len(keys) - 0.6)

    return svg(draw, size=(9.2, 3.4), x_label="")


def _places(values: list[Any]) -> dict[str, float]:
    """Height, 0 to 1, of each value of a key: numbers in order of size, others as they come."""
    distinct = list({str(value): value for value in values}.values())
    if all(isinstance(value, (int, float)) for value in distinct):
        distinct.sort()
    return {str(value): index / max(len(distinct) - 1, 1) for index, value in enumerate(distinct)}


def _short(text: str) -> str:
    try:
        return f"{float(text):.3g}"
    except ValueError:
        return text
