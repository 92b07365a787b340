"""The page of the papers' experiments: a picture, tables of the arms, and which of the bounds each holds."""

import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl

from tests.benchmarks.paper_arms import Problem

HEADER = """# The papers' experiments on real data

Written by `{command}`; `make papers` runs all problems and arms.
UA = 100 - accuracy on the forget set, RA = accuracy on the retain set, TA = accuracy on test rows (without the
forgotten class), MIA efficacy = share of the forget set that an attack calls unseen; at most 5,000 rows of a set are
scored (reviews: 1,000). Distances are to the retrained model, on the forget set. `training s`: everything but
evaluation, starting the worker included. Mean over the seeds, plus or minus half their range. As good as retraining, by
the means, and how far from it: UA at least 99 % (rows: within 1.5 points, reviews 2), RA and TA no more than 1 point
lower (reviews 2), MIA efficacy within 5 points, under half of the seconds.
Sizes are chosen for two CPU cores: models of 0.3 M parameters, MiniLM's first three blocks (17 M) and SmolLM2 (135 M,
in bf16); 12,000 rows of Fashion-MNIST (20,000 where rows are forgotten), 3,000 reviews, 120 short texts. Where rows or
texts go, RFA has a utility set as well: rows never trained on, 9,500, 2,700 and 120, of which no label is read (RFA by
gradient with images alone).

![What each arm forgets and keeps, beside retraining]({picture})
"""
PAPER = """## The paper's own figures

Mittal 2024 (arXiv 2411.11907), CIFAR-10, class 3 forgotten, 5 epochs, percent:

| | UA | MIA efficacy | RA | TA |
|---|---:|---:|---:|---:|
| ResNet-50, retrain | 100 | 100 | 98.02 | 96.70 |
| ResNet-50, PruneLoRA | 99.78 | 97.68 | 97.96 | 95.18 |
| ViT, retrain | 100 | 100 | 96.90 | 84.92 |
| ViT, PruneLoRA | 100 | 100 | 97.39 | 85.53 |

The tables of Qin et al. 2024 (arXiv 2411.08443) could not be read where this page was written: none are cited.
"""
LOUD = {
    "PruneLoRA": ("#d55e00", "D"),
    "RFA, one pass": ("#0072b2", "o"),
    "RFA, by gradient": ("#56b4e9", "s"),
}
QUIET = ("P", "X", "v", "^", "<", ">", "p", "h", "d", "*", "8")  # markers of all other arms
GREEN, SOFT = "#009e73", "#555b65"
FINE = (
    "activation distance",
    "feature distance",
    "sparsity",
    "peak GiB",
    "min-k AUC",
    "extraction strength",
)
BROKEN = 1e4  # where the picture cuts perplexities: such a model is broken
Scores = dict[str, Any]  # of one run: its scores and its cost
Found = dict[str, list[Scores]]  # of one problem, by arm: a run a seed


class Result(NamedTuple):
    """What was found on one problem."""

    problem: Problem
    found: Found


COST: dict[str, Callable[[Scores], float]] = {
    "training s": lambda own: own["cost"]["train_s"] + own["cost"]["solve_s"],
    "trained parameters": lambda own: own["cost"]["trained_parameters"],
    "sparsity": lambda own: own["cost"].get("sparsity", 0.0),
    "peak GiB": lambda own: own["cost"]["peak_memory_bytes"] / 2**30,
}
CLASSES: dict[str, Callable[[Scores], float]] = {
    "UA %": lambda own: 100 * (1 - own["scores"]["forget.accuracy"]),
    "RA %": lambda own: 100 * own["scores"]["retain.accuracy"],
    "TA %": lambda own: 100 * own["scores"]["general.accuracy"],
    "MIA efficacy %": lambda own: 100 * own["scores"]["mia_efficacy"],
    "activation distance": lambda own: own["scores"].get("activation_distance") or 0.0,
    "feature distance": lambda own: own["scores"].get("feature_distance") or 0.0,
    **COST,
}
TEXTS: dict[str, Callable[[Scores], float]] = {
    "forget perplexity": lambda own: own["scores"]["forget.perplexity"],
    "retain perplexity": lambda own: own["scores"]["retain.perplexity"],
    "perplexity, unseen rows of kept categories": lambda own: own["scores"]["general.perplexity"],
    "perplexity, unseen rows of the forgotten one": lambda own: own["scores"]["holdout.perplexity"],
    "min-k AUC": lambda own: own["scores"]["mia.min_k"],
    "extraction strength": lambda own: own["scores"]["forget.extraction_strength"],
    **COST,
}


def table(found: Found, generates: bool) -> Iterator[str]:
    """Arms by columns: mean, and half the range over the seeds."""
    columns = TEXTS if generates else CLASSES
    yield f"| | {' | '.join(columns)} |"
    yield f"|---|{'---:|' * len(columns)}"
    for name, runs in found.items():
        cells = []
        for title, column in columns.items():
            values = [float(column(own)) for own in runs]
            mean, spread = statistics.mean(values), (max(values) - min(values)) / 2
            form = (
                ",.3f"
                if title in FINE
                else ",.1f"
                if mean < 500
                else ",.0f"
                if mean < 1e9
                else ".0e"
            )
            cells.append(f"{mean:{form}}" + (f" ± {spread:{form}}" if spread else ""))
        yield f"| {name} | {' | '.join(cells)} |"


def bounds(result: Result) -> Iterator[str]:
    """What an arm must reach to be called as good as retraining, and whether its mean does."""
    apart, under = result.problem.apart, result.problem.under
    mean = means(result.found, CLASSES)
    oracle = mean["retrain"]
    yield "| as good as retraining? | UA | RA | TA | MIA efficacy | seconds |"
    yield "|---|---|---|---|---|---|"
    for name, own in mean.items():
        if name in ("before", "retrain"):
            continue
        gap = {key: own[key] - oracle[key] for key in CLASSES}
        share = own["training s"] / oracle["training s"]
        forgets = abs(gap["UA %"]) <= apart if apart else own["UA %"] >= 99
        tests = [
            (forgets, f"{gap['UA %']:+.1f}"),
            (gap["RA %"] >= -under, f"{gap['RA %']:+.1f}"),
            (gap["TA %"] >= -under, f"{gap['TA %']:+.1f}"),
            (abs(gap["MIA efficacy %"]) <= 5, f"{gap['MIA efficacy %']:+.1f}"),
            (share < 0.5, f"{share:.0%}"),
        ]
        yield (
            f"| {name} | "
            + " | ".join(f"{'held' if held else '**missed**'}, {text}" for held, text in tests)
            + " |"
        )


def means(
    found: Found, columns: dict[str, Callable[[Scores], float]]
) -> dict[str, dict[str, float]]:
    """Each arm's columns, averaged over the seeds."""
    return {
        name: {
            title: statistics.mean(float(column(own)) for own in runs)
            for title, column in columns.items()
        }
        for name, runs in found.items()
    }


def picture(path: Path, results: list[Result]) -> None:
    """A panel a problem: what an arm forgets (up) against what it keeps (to the right), in points apart from retraining
    or, of texts, as perplexity. A shade is where the bounds are held."""
    from matplotlib import pyplot as plt

    mpl.use("Agg")
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.6), layout="constrained")
    panels = list(axes.flat)
    for panel, result in zip(panels, results, strict=False):
        (_draw_texts if result.problem.generates else _draw_classes)(panel, result)
        panel.set_title(result.problem.title, fontsize=9, loc="left")
        panel.grid(alpha=0.25)
    for panel in panels[len(results) :]:
        panel.axis("off")
    handles: dict[str, Any] = {}
    for panel in panels[: len(results)]:
        own, names = panel.get_legend_handles_labels()
        handles |= {
            name: handle for name, handle in zip(names, own, strict=True) if name not in handles
        }
    panels[-1].legend(
        handles.values(), handles.keys(), loc="center", frameon=False, ncols=2, fontsize=9
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_classes(panel: Any, result: Result) -> None:
    mean, problem = means(result.found, CLASSES), result.problem
    oracle = mean["retrain"]
    low, high = (
        (-problem.apart, problem.apart)
        if problem.apart
        else (99 - oracle["UA %"], 100 - oracle["UA %"])
    )
    panel.axvspan(-problem.under, 1e3, color=GREEN, alpha=0.08, lw=0)
    panel.axhspan(low - 0.05, high + 0.05, color=GREEN, alpha=0.14, lw=0)
    for index, (name, own) in enumerate(mean.items()):
        _mark(panel, name, index, own["TA %"] - oracle["TA %"], own["UA %"] - oracle["UA %"])
    panel.set_xscale("symlog", linthresh=2)
    panel.set_yscale("symlog", linthresh=2)
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter(lambda value, _position: f"{value:+g}")
    panel.set_xlim(right=3)
    panel.set_xlabel("test accuracy, points from retraining's", fontsize=8)
    panel.set_ylabel("wrong on the forget set, points from retraining's", fontsize=8)


def _draw_texts(panel: Any, result: Result) -> None:
    for index, (name, own) in enumerate(means(result.found, TEXTS).items()):
        _mark(
            panel,
            name,
            index,
            min(own["retain perplexity"], BROKEN),
            min(own["forget perplexity"], BROKEN),
        )
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.invert_xaxis()
    panel.xaxis.set_major_formatter(lambda value, _position: f"{value:,g}")
    panel.xaxis.set_minor_formatter(lambda _value, _position: "")
    panel.yaxis.set_major_formatter(lambda value, _position: f"{value:,g}")
    panel.set_xlabel(
        f"perplexity of kept texts (better to the right), cut at {BROKEN:,.0f}", fontsize=8
    )
    panel.set_ylabel("perplexity of the forgotten texts", fontsize=8)


def _mark(panel: Any, name: str, index: int, across: float, up: float) -> None:
    if name == "retrain":
        look: dict[str, Any] = {"color": GREEN, "marker": "*", "s": 220, "zorder": 4}
    elif name in LOUD:
        look = {"color": LOUD[name][0], "marker": LOUD[name][1], "s": 75, "zorder": 3}
    else:
        look = {
            "color": "#9aa1ab" if name != "before" else SOFT,
            "marker": QUIET[index % len(QUIET)],
            "s": 45,
        }
    panel.scatter([across], [up], label=name, edgecolors="white", linewidths=0.6, **look)


def write(path: Path, results: list[Result], seeds: str, processes: int) -> None:
    """The page and its picture, with the problems that are there."""
    picture(path.with_suffix(".png"), results)
    sections = []
    for result in results:
        judged = [] if result.problem.generates else [*bounds(result), ""]
        title = f"## {result.problem.title} (seeds {seeds})"
        sections.append(
            "\n".join([title, "", *table(result.found, result.problem.generates), "", *judged])
        )
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "ray", "deepspeed", "peft", "transformers")
    )
    machine = f"{platform.machine()}, {processes} problems side by side with a core and a thread each, {versions}."
    command = " ".join(["python -m tests.benchmarks.papers", *sys.argv[1:]])
    header = HEADER.format(command=command, picture=path.with_suffix(".png").name)
    path.write_text("\n".join([header, *sections, PAPER, machine]) + "\n", encoding="utf-8")
