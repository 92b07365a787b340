"""The page's line plots, as SVG in data addresses: the same bytes for the same numbers."""

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

NOT_TERMS = (
    "step",
    "learning_rate",
    "tokens_per_s",
)  # In losses.jsonl, beside the terms of the objective.
LOG_SCALE_FROM = 30  # A curve whose largest value is this many times its smallest is drawn on a logarithmic axis.
RELEARNED = "relearn.probability."  # Before the number of steps, in a model's entry of scores.json.
SOFT = "#555b65"
LOOKS: dict[str, dict[str, Any]] = {  # As the page draws the models' scores.
    "after": {"color": "#0072b2", "marker": "o"},
    "oracle": {"color": "#009e73", "marker": "D", "markerfacecolor": "white"},
}


def loss_curves(losses: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A small plot for each term of the objective that is not zero throughout."""
    terms = dict.fromkeys(key for entry in losses for key in entry if key not in NOT_TERMS)
    curves: list[dict[str, str]] = []
    for term in terms:
        values = [_number(entry.get(term)) for entry in losses]
        if any(value and not math.isnan(value) for value in values):
            curves.append(
                {"term": term, "image": _loss_curve([entry["step"] for entry in losses], values)}
            )
    return curves


def relearn_curve(models: Mapping[str, Mapping[str, float | None]]) -> str | None:
    """How the forget set's held-out half comes back, a line a model; None where no model has been fine-tuned."""
    lines = {name: line for name, entry in models.items() if (line := _relearned(entry))}
    if not lines:
        return None
    steps = sorted({step for line in lines.values() for step in line})

    def draw(axes: Any) -> None:
        for name, line in lines.items():
            axes.plot(
                list(line),
                list(line.values()),
                label=name,
                linewidth=1.6,
                markersize=5,
                **LOOKS.get(name, {}),
            )
        axes.set_xscale("symlog", linthresh=1, linscale=0.5)  # Most happens in the first steps.
        axes.set_xticks(steps, [str(step) for step in steps])
        axes.set_xticks([], minor=True)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("probability", color=SOFT)
        axes.legend(frameon=False, labelcolor=SOFT)

    return svg(draw)


def _relearned(entry: Mapping[str, float | None]) -> dict[int, float]:
    """Probability by steps, in order; gaps where it was not a number."""
    found = {
        key.removeprefix(RELEARNED): value
        for key, value in entry.items()
        if key.startswith(RELEARNED)
    }
    known = {int(step): _number(value) for step, value in found.items() if step.isdecimal()}
    return {step: known[step] for step in sorted(known)}


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _loss_curve(steps: Sequence[int], values: Sequence[float]) -> str:
    """One curve; gaps where the loss was not a number."""
    known = [value for value in values if math.isfinite(value)]

    def draw(axes: Any) -> None:
        axes.plot(
            steps, values, color="#0072b2", linewidth=1.6, marker="o" if len(steps) < 3 else None
        )
        if known and min(known) > 0 and max(known) >= LOG_SCALE_FROM * min(known):
            axes.set_yscale("log")
        elif known and min(known) >= 0:
            axes.set_ylim(bottom=0)

    return svg(draw)


def svg(
    draw: Callable[[Any], None], *, size: tuple[float, float] = (4.2, 2.1), x_label: str = "step"
) -> str:
    """A plot as an SVG in a data address; `size` in inches."""
    import matplotlib  # late: a second to import, for every command
    from matplotlib.figure import Figure

    with matplotlib.rc_context(
        {"svg.hashsalt": "ray-unlearn", "font.size": 9, "axes.edgecolor": "#9aa1ab"}
    ):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
        axes.tick_params(colors=SOFT, which="both")
        axes.set_xlabel(x_label, color=SOFT)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
