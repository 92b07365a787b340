"""The search with shared work against runs of their own, and Optuna against random search: one command, one page.

    python -m tests.benchmarks.search demo

Needs what `make demo` leaves. Runs `ray-unlearn tune` twice (tpe, random) with as many trials, then some of the random
search's configurations with `ray-unlearn run`, as somebody without the search would, scored by likelihoods alone, too.
Writes docs/search_benchmark.md and .png. What has finished is not repeated when the command is started again.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import matplotlib as mpl

from tests.benchmarks.suite import ONE_STRENGTH
from tuning.page import best_so_far
from tuning.record import TrialRecord, as_configured, read_trials
from tuning.score import parse_constraints

DOCS = Path(__file__).parents[2] / "docs"
METHODS = {"tpe": "Optuna (TPE)", "random": "random search"}
SHOWN = (10, 20, 30, 40, 50, 60)  # trials after which the best so far is told


def timed(folder: Path, arguments: list[str]) -> float:
    """Seconds of one `ray-unlearn` command; from an earlier start where it has finished there."""
    note = folder.with_suffix(".seconds")
    if not note.exists():
        started = time.monotonic()
        command = [sys.executable, "-m", "pipelines", *arguments, f"output_dir={folder}"]
        print(" ".join(command[2:]), flush=True)
        subprocess.run(command, check=True)
        note.write_text(str(time.monotonic() - started))
    return float(note.read_text())


def search(arguments: argparse.Namespace, method: str) -> tuple[float, dict[int, TrialRecord]]:
    """Seconds and trials of a search."""
    folder = arguments.output / f"search-{method}"
    options = ["--trials", str(arguments.trials), "--method", method]
    seconds = timed(folder, ["tune", arguments.config, *arguments.overrides, *options])
    return seconds, read_trials(folder)


def alone(arguments: argparse.Namespace, trials: dict[int, TrialRecord]) -> list[float]:
    """Seconds of each of some runs of their own."""
    chosen = [own for own in trials.values() if own.values][: arguments.alone]
    found: list[float] = []
    for own in chosen:
        values = [f"{key}={json.dumps(value)}" for key, value in own.values.items()]
        quick = ["evaluation.quick=true", "evaluation.robustness=[]"]
        folder = arguments.output / f"search-alone-{own.number}"
        found.append(
            timed(folder, ["run", arguments.config, *arguments.overrides, *values, *quick])
        )
    return found


def write(
    arguments: argparse.Namespace,
    searches: dict[str, tuple[float, dict[int, TrialRecord]]],
    own: list[float],
) -> None:
    """The page and the picture."""
    lines = [
        "# The search, measured",
        "",
        f"Written by `python -m tests.benchmarks.search {' '.join([arguments.config, *arguments.overrides])}` on "
        f"{platform.machine()}, "
        + ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "ray", "optuna"))
        + ". Seconds are of whole commands, start-up included.",
        "",
        "| | seconds in all | trials | seconds a trial |",
        "|---|---:|---:|---:|",
    ]
    for method, (seconds, trials) in searches.items():
        lines.append(
            f"| {METHODS[method]}, shared work | {seconds:.0f} | {len(trials)} | {seconds / len(trials):.1f} |"
        )
    seconds, trials = searches["tpe"]
    each = sum(own) / len(own)
    lines.append(f"| `ray-unlearn run`, one at a time | {sum(own):.0f} | {len(own)} | {each:.1f} |")
    lines += [
        "",
        f"Without shared work a trial takes **{each / (seconds / len(trials)):.1f} times** as long.",
        "",
    ]
    shown = [number for number in SHOWN if number <= arguments.trials]
    lines += [
        "Least distance so far at utility 0.97 or more, by trials:",
        "",
        "| | " + " | ".join(map(str, shown)) + " |",
        "|---|" + "---:|" * len(shown),
    ]
    for method, (_, trials) in searches.items():
        scored = {number: t.score for number, t in trials.items() if t.score is not None}
        line = best_so_far(scored, parse_constraints([]))
        lines.append(
            f"| {METHODS[method]} | "
            + " | ".join(f"{line[min(n, len(line)) - 1]:.3f}" for n in shown)
            + " |"
        )
    first = as_configured(trials)
    if first is not None and first.score is not None:
        lines += [
            "",
            f"As configured: distance {first.score.distance:.3f}, utility {first.score.utility:.3f}.",
        ]
    lines += ["", "![Least distance so far, by trials](search_benchmark.png)", ""]
    (DOCS / "search_benchmark.md").write_text("\n".join(lines), encoding="utf-8")
    draw(searches)
    print("\n".join(lines))


def draw(searches: dict[str, tuple[float, dict[int, TrialRecord]]]) -> None:
    """Best so far, a line a method."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for method, (_, trials) in searches.items():
        scored = {number: own.score for number, own in trials.items() if own.score is not None}
        axes.step(
            range(1, len(scored) + 1),
            best_so_far(scored, parse_constraints([])),
            where="post",
            label=METHODS[method],
        )
    axes.set_xlabel("trials")
    axes.set_ylabel("least distance so far, at utility 0.97 or more")
    axes.set_ylim(bottom=0)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(DOCS / "search_benchmark.png", dpi=110)


def main() -> None:
    """Run everything and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", default="demo", help="a preset or a YAML file")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--alone", type=int, default=3, help="runs of their own")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs"), help="folder for the searches and runs"
    )
    arguments = parser.parse_args()
    arguments.overrides = [*ONE_STRENGTH, *arguments.overrides]
    searches = {method: search(arguments, method) for method in METHODS}
    write(arguments, searches, alone(arguments, searches["random"][1]))


if __name__ == "__main__":
    main()
