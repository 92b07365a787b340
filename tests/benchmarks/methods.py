"""Every method by name on one problem, with equal steps and one learning rate: docs/methods.md.

    python -m tests.benchmarks.methods [--methods npo,...]

Problem, target and oracles are those of `tests.benchmarks.suite`. What is complete is not made again.
"""

import argparse
import json
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

# What the table cannot say, of the runs that docs/methods.md was written from.
NOTES = """
## How to read it

- One learning rate is no fair search. NPO was tried at three: 3e-4 gives it a token distance of 0.651 (retain 0.899),
  5e-4 the one above, and 1e-3 one of 1.92 (retain 0.254). Gradient difference at 1e-3, with 24 steps: 1.29 (retain
  0.698). At the highest rate most of NPO's distance, 1.48, is of tokens that fell below the oracle's, and 0.38 is still
  of tokens that did not fall far enough: a loss without an aim for each token cannot have both.
- RMU and circuit breakers have hardly begun: their authors give them 150 steps. Circuit breakers start where their
  gradient is 0, as an adapter that is new changes nothing, and the cosine is at its largest; it stood at 0.99999 after
  each of the 20 steps.
- The methods of `rfa/methods.py` that are not in the table were run on tiny models alone, in tests.
"""


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
    return "\n".join(lines) + "\n" + NOTES


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
        suite.make(PROBLEM, [name])
        run = suite.run_of(PROBLEM, name).folder
        scores[name] = json.loads((run / "scores.json").read_text())
        text = page(scores)
        (suite.DOCS / "methods.md").write_text(text, encoding="utf-8")
    print(f"{suite.DOCS / 'methods.md'}: {len(scores)} methods")


if __name__ == "__main__":
    main()
