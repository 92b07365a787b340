import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipelines.__main__ import app
from pipelines.storage.seal import file_digests
from tests.pipelines.evaluation.test_verdict import forget_entry, scores_of
from tests.pipelines.report.test_page import write_run

BEFORE, ORACLE = forget_entry(0.9), forget_entry(0.5)


def seal(folder: Path, status: str = "complete") -> None:
    """Write the manifest of a finished run, over the files that are there."""
    manifest = {"schema": 1, "status": status, "files": file_digests(folder)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def gate(folder: Path, level: float, *options: str) -> tuple[int, str]:
    """Judge a run whose forget-set scores went from 0.9 to `level`, with an oracle at 0.5; exit code and stderr."""
    after = forget_entry(level, forget__truth_ratio=None)
    write_run(folder, scores_of(before=BEFORE, after=after, oracle=ORACLE))
    seal(folder)
    result = CliRunner().invoke(app, ["gate", str(folder), *options])
    assert result.stdout == ""
    return result.exit_code, result.stderr


def require(*conditions: str) -> list[str]:
    return [word for condition in conditions for word in ("--require", condition)]


def test_a_run_that_cannot_be_told_from_the_oracle_passes(tmp_path: Path) -> None:
    assert gate(tmp_path, 0.5) == (0, f"Passed: {tmp_path}\n")


def test_a_run_that_has_not_forgotten_is_refused_with_the_pages_sentence(tmp_path: Path) -> None:
    code, told = gate(tmp_path, 0.88)
    assert (code, told.count("\n")) == (3, 1)
    assert told.startswith(
        "verdict: traces_remain, required: indistinguishable (Traces remain: on the forget set the"
    )


def test_another_verdict_passes_where_it_is_named(tmp_path: Path) -> None:
    options = ("--verdict", "indistinguishable", "--verdict", "traces_remain")
    assert gate(tmp_path, 0.88, *options)[0] == 0


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
        (["--verdict", "fine"], "--verdict: found 'fine', allowed: indistinguishable, traces_re"),
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


def test_what_verify_refuses_or_finds_changed_does_not_pass(tmp_path: Path) -> None:
    assert gate(tmp_path, 0.5)[0] == 0
    with (tmp_path / "losses.jsonl").open("a") as file:
        file.write(" ")
    result = CliRunner().invoke(app, ["gate", str(tmp_path)])
    assert (result.exit_code, result.stderr) == (3, "losses.jsonl: changed\n")
    seal(tmp_path, "running")
    result = CliRunner().invoke(app, ["gate", str(tmp_path)])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "manifest.json: status: found 'running', allowed: 'complete'" in result.stderr
    (tmp_path / "manifest.json").write_text('{"schema": 1, "status": "complete"}')
    assert CliRunner().invoke(app, ["gate", str(tmp_path)]).exit_code == 2


WRONG: list[Any] = [None, 7, "text", True, [], [1], {"a": 1}, {"a": {"b": "c"}}]


@pytest.mark.parametrize("command", ["gate", "report", "verify"])
@pytest.mark.parametrize("name", ["scores.json", "manifest.json"])
def test_values_of_other_types_are_one_line_that_names_file_and_key(
    tmp_path: Path, command: str, name: str
) -> None:
    assert gate(tmp_path, 0.5)[0] == 0
    path = tmp_path / name
    whole = path.read_text()
    keys = [
        *json.loads(whole),
        "sets",
        "strengths",
        "mlflow",
        "model",
        "machine",
        "oracle_spread",
        "request",
    ]
    found: list[str] = []
    for key in keys:
        for value in WRONG:
            path.write_text(json.dumps({**json.loads(whole), key: value}))
            result = CliRunner().invoke(app, [command, str(tmp_path)])
            assert result.exit_code in (0, 1, 2, 3), (key, value, result.exception)
            if result.exit_code == 2:
                assert result.stderr.count("\n") == 1 and name in result.stderr, result.stderr
                found.append(key)
            assert not isinstance(result.exception, Exception) or result.exit_code, key
            assert "Failed" not in result.stderr, (key, value, result.stderr)
    # `verify` reads no scores: to it they are a file like any other.
    assert ("files" in found) == (name == "manifest.json")
    assert ("models" in found) == (name == "scores.json" and command != "verify")


def test_deep_nesting_and_losses_that_are_no_numbers_end_nothing(tmp_path: Path) -> None:
    assert gate(tmp_path, 0.5)[0] == 0
    lines = ['{"step": 0, "loss": "much"}', '{"step": 1, "loss": [1]}', "[" * 100_000, "7"]
    (tmp_path / "losses.jsonl").write_text("\n".join([*lines, '{"step": 2, "loss": 1.0}']))
    assert CliRunner().invoke(app, ["report", str(tmp_path)]).exit_code == 0
    assert "4 unreadable lines" in (tmp_path / "report.html").read_text()
    (tmp_path / "scores.json").write_text('{"schema": 1, "models": ' + "[" * 100_000)
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "scores.json: not JSON" in result.stderr
