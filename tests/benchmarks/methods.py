"""Every method by name on one problem, with equal steps and one learning rate: docs/methods.md.

    python -m tests.benchmarks.methods [--methods npo,...]

Problem, target and oracles are those of `tests.benchmarks.suite`. What is complete is not made again.
"""

import argparse
import platform
from collections.abc import Mapping
from typing import Any

from pipelines.evaluation.verdict import verdict
from rfa.methods import METHODS
from tests.benchmarks import suite

PROBLEM = "authors-0"
SOLVER = "per-token"  # of `suite.METHODS`
STEPS = ("solve.mode=off", "train.steps=20", "train.learning_rate=5e-4")
SCORES = {
    "token distance": "forget.token_distance",
    "other words": "forget.token_distance_paraphrased",
    "probability": "forget.probability",
    "facts": "forget.fact_recall",
    "rows remembered": "forget.remembered_rows",
    "min-k": "mia.min_k",
    "min-k++": "mia.min_k_plus_plus",
    "gradient norm": "mia.grad_norm",
    "retain": "retain.probability",
    "general": "general.probability",
}


def cells(entry: Mapping[str, float | None]) -> list[str]:
    return [suite.number(entry.get(key)) for key in SCORES.values()]


def row(*parts: str) -> str:
    return f"| {' | '.join(parts)} |"


def page(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """Return docs/methods.md: a line a method, the nearest to the oracles first."""
    models = scores[SOLVER]["models"]
    spread = scores[SOLVER]["oracle_spread"]
    lines = [
        "# Methods by name",
        "",
        "Written by `python -m tests.benchmarks.methods` on "
        f"{platform.machine()}, two CPU workers of one thread, fp32: problem {PROBLEM} of "
        "[the suite](suite.md), SmolLM2-135M-Instruct, LoRA of rank 64 on `o_proj` and `down_proj` "
        f"of every block. All methods but `{SOLVER}` were given `{' '.join(STEPS)}` and the "
        "constants of `rfa/methods.py`: an equal budget, and no search. Distances are in nats a "
        "token; all other scores are better the nearer they are to the oracles'.",
        "",
        row("method", *SCORES, "verdict"),
        "|---|" + "---:|" * len(SCORES) + "---|",
        row("*the untouched model*", *cells(models["before"]), ""),
        row("*two oracles, mean*", *cells(models["oracle"]), ""),
        row(
            "*between the oracles*", *(suite.number(spread.get(key)) for key in SCORES.values()), ""
        ),
    ]
    distance = SCORES["token distance"]
    for name in sorted(scores, key=lambda name: scores[name]["models"]["after"][distance]):
        level = verdict(scores[name]).level
        lines.append(row(f"`{name}`", *cells(scores[name]["models"]["after"]), level))
    return "\n".join([*lines, ""])


def main() -> None:
    """Run what is asked for and missing, and write the page after each method."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", default=",".join(METHODS))
    options = parser.parse_args()
    scores: dict[str, Mapping[str, Any]] = {}
    for name in (SOLVER, *options.methods.split(",")):
        if name != SOLVER:
            suite.METHODS[name] = (*suite.RANK_64, f"objective.method={name}", *STEPS)
        scores |= suite.solve(PROBLEM, [name]).scores
        text = page(scores)
        (suite.DOCS / "methods.md").write_text(text, encoding="utf-8")
    print(f"{suite.DOCS / 'methods.md'}: {len(scores)} methods")


if __name__ == "__main__":
    main()
