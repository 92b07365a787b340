"""The page of the papers' experiments: tables of the arms, and which of the bounds each holds."""

import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

HEADER = """# The papers' experiments on real data

Written by `{command}`; `make papers` runs all problems and arms.
UA = 100 - accuracy on the forget set, RA = accuracy on the retain set, TA = accuracy on test rows (without the
forgotten class), MIA efficacy = share of the forget set that an attack calls unseen; at most 5,000 rows of a set are
scored (reviews: 1,000). Distances are to the retrained model, on the forget set. `training s`: everything but
evaluation, starting the worker included. Mean over the seeds, plus or minus half their range. As good as retraining, by
the means, and how far from it: UA at least 99 % (rows: within 1.5 points, reviews 2), RA and TA no more than 1 point
lower (reviews 2), MIA efficacy within 5 points, under half of the seconds.
Sizes are chosen for two CPU cores: models of 0.3 M parameters, MiniLM's first three blocks (17 M) and SmolLM2 (135 M,
in bf16); 14,000 rows of Fashion-MNIST (20,000 where rows are forgotten), 3,000 reviews, 120 short texts. Where rows or
texts go, RFA has a utility set as well: rows never trained on, 9,500, 2,700 and 120, of which no label is read (RFA by
gradient with images alone).
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
Scores = dict[str, Any]  # of one run: its scores and its cost
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


def table(found: dict[str, list[Scores]], generates: bool) -> Iterator[str]:
    """Arms by columns: mean, and half the range over the seeds."""
    columns = TEXTS if generates else CLASSES
    yield f"| | {' | '.join(columns)} |"
    yield f"|---|{'---:|' * len(columns)}"
    for name, runs in found.items():
        cells = []
        for column in columns.values():
            values = [float(column(own)) for own in runs]
            spread = (max(values) - min(values)) / 2
            digits = 0 if values[0] >= 500 else 1 if values[0] >= 10 else 3
            cells.append(f"{statistics.mean(values):,.{digits}f}" + (f" ± {spread:.{digits}f}" if spread else ""))
        yield f"| {name} | {' | '.join(cells)} |"


def bounds(found: dict[str, list[Scores]], apart: float, under: float) -> Iterator[str]:
    """What an arm must reach to be called as good as retraining, and whether its mean does.

    Args:
        apart: points that the forget set's accuracy may lie from retraining's; 0 where a class must go.
        under: points that RA and TA may lie under retraining's.
    """
    mean = {
        name: {key: statistics.mean(float(column(own)) for own in runs) for key, column in CLASSES.items()}
        for name, runs in found.items()
    }
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
        yield f"| {name} | " + " | ".join(f"{'held' if held else '**missed**'}, {text}" for held, text in tests) + " |"


def write(path: Path, sections: list[str], processes: int) -> None:
    """The page, with the sections that are there."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "ray", "deepspeed", "peft", "transformers"))
    machine = f"{platform.machine()}, {processes} problems side by side with a core and a thread each, {versions}."
    header = HEADER.format(command=" ".join(["python -m tests.benchmarks.papers", *sys.argv[1:]]))
    path.write_text("\n".join([header, *sections, PAPER, machine]) + "\n", encoding="utf-8")
