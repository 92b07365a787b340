"""The page's plots, as SVG in data addresses, with the same bytes for the same numbers."""

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.evaluation.metrics.distance import MARGIN
from pipelines.evaluation.metrics.relearning import Relearning

# Keys of losses.jsonl beside the terms of the objective.
NOT_TERMS = ("step", "learning_rate", "tokens_per_s")
# A curve whose largest value is this many times its smallest is drawn on a logarithmic axis.
LOG_SCALE_FROM = 30
SOFT = "#555b65"
# Log-probabilities below this are drawn at it: further down no difference matters.
LOWEST = -25.0
# The same looks as of the models' scores on the page. The original is not relearned.
LOOKS: dict[str, dict[str, Any]] = {
    "after": {"color": "#0072b2", "marker": "o"},
    "oracle": {"color": "#009e73", "marker": "D", "markerfacecolor": "white"},
}


def loss_curves(losses: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return a small plot for each term of the objective that is not zero throughout."""
    steps = [entry["step"] for entry in losses]
    terms = dict.fromkeys(key for entry in losses for key in entry if key not in NOT_TERMS)
    curves: list[dict[str, str]] = []
    for term in terms:
        values = np.array([_number(entry.get(term)) for entry in losses])
        # A term of weight 0 is logged as 0 at every step.
        if np.nan_to_num(values).any():
            curves.append({"term": term, "image": _loss_curve(steps, values)})
    return curves


def relearn_curve(
    models: Mapping[str, Mapping[str, float | None]], relearning: Relearning
) -> str | None:
    """Plot the probability of the forget rows that are not learned over steps, a line a model.

    Returns None if no model was relearned so.
    """
    # Precedes the number of steps in a model's scores.
    beginning = relearning.key("probability.")
    lines: dict[str, dict[int, float]] = {}
    for name in LOOKS:
        for key, value in models.get(name, {}).items():
            if key.startswith(beginning):
                lines.setdefault(name, {})[int(key.removeprefix(beginning))] = _number(value)
    if not lines:
        return None
    steps = sorted(set().union(*lines.values()))

    def draw(axes: Any) -> None:
        for name, line in lines.items():
            points = zip(*sorted(line.items()), strict=True)
            axes.plot(*points, label=name, linewidth=1.6, markersize=5, **LOOKS[name])
        # Most happens in the first steps, and step 0 has no logarithm.
        axes.set_xscale("symlog", linthresh=1, linscale=0.5)
        axes.set_xticks(steps, list(map(str, steps)))
        axes.set_xticks([], minor=True)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("probability", color=SOFT)
        axes.legend(frameon=False, labelcolor=SOFT)

    return svg(draw)


def token_scatter(tokens: Mapping[str, Sequence[float]]) -> str | None:
    """Plot each token of the forget answers: its log-probability to the oracle and to the model.

    `tokens` is the part of that name of a score file. Returns None if a model is missing.
    """
    if not {"oracle", "before", "after"} <= tokens.keys():
        return None
    oracle, before, after = (np.array(tokens[name]) for name in ("oracle", "before", "after"))
    is_learned = before - oracle > MARGIN
    lowest = max(LOWEST, min(oracle.min(), before.min(), after.min()) - 0.5)

    def places(of_model: Any, is_drawn: Any) -> Any:
        """Return the distinct places of some tokens, which one mark each shows, as x and y."""
        points = np.stack([oracle[is_drawn], of_model[is_drawn]], axis=1)
        return np.unique(points.clip(lowest).round(1), axis=0).T

    def draw(axes: Any) -> None:
        line = {"color": "#1b1f26", "linewidth": 1, "linestyle": "--"}
        axes.plot([lowest, 0], [lowest, 0], label="as a retrained model", zorder=4, **line)
        faint = {"color": "#c3c8d0", "marker": ".", "markersize": 5, "linestyle": "none"}
        axes.plot(*places(before, np.ones_like(is_learned)), label="before unlearning", **faint)
        # Told apart by shape and by lightness as well as by colour.
        kinds = (
            ("to be kept", ~is_learned, {"color": "#0072b2", "marker": "o", "fillstyle": "none"}),
            ("learned, to be forgotten", is_learned, {"color": "#d55e00", "marker": "^"}),
        )
        for words, is_drawn, look in kinds:
            label = f"{words} ({is_drawn.sum()})"
            points = places(after, is_drawn)
            axes.plot(*points, label=label, linestyle="none", markersize=4.5, **look)
        corners = ((0.02, 0.98, "left", "top"), (0.98, 0.02, "right", "bottom"))
        for (x, y, across, up), words in zip(corners, ("too little", "too much"), strict=True):
            place = {"transform": axes.transAxes, "ha": across, "va": up, "color": SOFT}
            axes.text(x, y, f"{words} forgotten", fontsize=8, **place)
        # Room for the words above the many points at 0.
        axes.set_xlim(lowest, -0.06 * lowest)
        axes.set_ylim(lowest, -0.06 * lowest)
        axes.set_ylabel("log-probability to the model after unlearning", color=SOFT)
        legend = {"loc": "lower center", "bbox_to_anchor": (0.45, 1.0), "ncols": 2, "fontsize": 8}
        axes.legend(frameon=False, labelcolor=SOFT, **legend)

    return svg(draw, size=(5.2, 5.0), x_label="log-probability to the oracle (0: certain)")


def _number(value: object) -> float:
    """Return a number as it is, and NaN for anything else, which is drawn as a gap."""
    return float(value) if isinstance(value, (int, float)) else math.nan


def _loss_curve(steps: Sequence[int], values: Any) -> str:
    """Plot one term of the loss, with gaps where it was not a number."""
    finite = values[np.isfinite(values)]
    marker = "o" if len(steps) < 3 else None

    def draw(axes: Any) -> None:
        axes.plot(steps, values, color="#0072b2", linewidth=1.6, marker=marker)
        if finite.size and finite.min() > 0 and finite.max() >= LOG_SCALE_FROM * finite.min():
            axes.set_yscale("log")
        elif finite.size and finite.min() >= 0:
            axes.set_ylim(bottom=0)

    return svg(draw)


def svg(
    draw: Callable[[Any], None], *, size: tuple[float, float] = (4.2, 2.1), x_label: str = "step"
) -> str:
    """Return a plot as an SVG in a data address. `size` is in inches."""
    # Imported late, as it takes a second, which every command would wait for.
    import matplotlib
    from matplotlib.figure import Figure

    # A fixed salt, and no date below, so that the same numbers give the same bytes.
    style: dict[Any, Any] = {
        "svg.hashsalt": "ray-unlearn",
        "font.size": 9,
        "axes.edgecolor": "#9aa1ab",
    }
    with matplotlib.rc_context(style):
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
