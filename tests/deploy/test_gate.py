from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.__main__ import app
from tests.pipelines.evaluation.test_verdict import forget_entry, scores_of
from tests.pipelines.report.test_page import write_run

BEFORE, ORACLE = forget_entry(0.9), forget_entry(0.5)


def gate(folder: Path, level: float, *options: str) -> tuple[int, str]:
    """Judge a run whose forget-set scores went from 0.9 to `level`, with an oracle at 0.5; exit code and stderr."""
    after = forget_entry(level, forget__truth_ratio=None)
    write_run(folder, scores_of(before=BEFORE, after=after, oracle=ORACLE))
    result = CliRunner().invoke(app, ["gate", str(folder), *options])
    assert result.stdout == ""
    return result.exit_code, result.stderr


def require(*conditions: str) -> list[str]:
    return [word for condition in conditions for word in ("--require", condition)]


def test_a_forgotten_run_passes(tmp_path: Path) -> None:
    assert gate(tmp_path, 0.5) == (0, f"Passed: {tmp_path}\n")


def test_a_run_that_has_not_forgotten_is_refused_with_the_pages_sentence(tmp_path: Path) -> None:
    code, told = gate(tmp_path, 0.88)
    assert (code, told.count("\n")) == (3, 1)
    assert told.startswith(
        "verdict: not_forgotten, required: forgotten (Not forgotten: on the forget set the model is"
    )


def test_another_verdict_passes_where_it_is_named(tmp_path: Path) -> None:
    assert gate(tmp_path, 0.88, "--verdict", "forgotten", "--verdict", "not_forgotten")[0] == 0


def test_every_missed_limit_is_a_line(tmp_path: Path) -> None:
    missed = [
        "after.forget.probability<=0.2",
        "after.retain.probability > 0.94",
        "after.forget.truth_ratio>=0",
    ]
    held = [
        "after.forget.probability<=0.5",
        "oracle.forget.rouge>4e-1",
        "before.forget.rouge >= 0.9",
    ]
    code, told = gate(tmp_path, 0.5, *require(*missed, *held))
    assert code == 3
    assert told.splitlines() == [
        "after.forget.probability: 0.5, required: <= 0.2",
        "after.retain.probability: 0.94, required: > 0.94",
        "after.forget.truth_ratio: not measured, required: >= 0",
    ]


@pytest.mark.parametrize(
    "options, message",
    [
        (
            require("after.forget.probability=0.2"),
            "--require: found 'after.forget.probability=0.2', allowed: MODEL.SC",
        ),
        (
            require("after.forget.probability<=nan"),
            "--require: found 'after.forget.probability<=nan', allowed",
        ),
        (
            require("after.forget.rogue<=0.2"),
            "--require: found score 'forget.rogue', after has: forget.exact_mem",
        ),
        (
            require("later.forget.rouge<=0.2"),
            "--require: found model 'later', this run has: before, after, oracle",
        ),
        (["--verdict", "fine"], "--verdict: found 'fine', allowed: forgotten, costly, partly"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    tmp_path: Path, options: list[str], message: str
) -> None:
    code, told = gate(tmp_path, 0.5, *options)
    assert (code, told.count("\n")) == (2, 1)
    assert message in told


def test_a_folder_without_scores_is_wrong_input(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["gate", str(tmp_path)])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "config.yaml: not found; allowed: a folder written by ray-unlearn run" in result.stderr
