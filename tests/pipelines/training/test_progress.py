"""What the driver records of a run's steps."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.storage.output import OutputDir
from pipelines.terminal import Terminal
from pipelines.training.progress import FILE_NAME, ProgressLog


def hear(folder: Path, steps: int, *messages: dict[str, Any]) -> None:
    """Record messages of the workers in a folder."""
    terminal = Terminal()
    with (
        terminal.chatter_to(folder / "run.log"),
        ProgressLog(OutputDir(str(folder)), "Unlearning", steps, terminal) as log,
    ):
        for message in messages:
            log.on_message(message)


def test_a_run_goes_on_behind_the_last_whole_line_of_a_killed_one(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text('{"step": 0, "loss": 2.0}\n{"step": 1, "lo')
    hear(tmp_path, 3, {"step": 1, "loss": 1.0})
    lines = (tmp_path / FILE_NAME).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1]


def test_it_says_after_how_many_steps_enough_was_forgotten(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hear(tmp_path, 3, {"step": 0, "loss": 1.0}, {"stopped_after": 2})
    assert "Unlearning: 2 of 3 steps were enough (objective.stop_at)" in capfd.readouterr().err
    assert len((tmp_path / FILE_NAME).read_text().splitlines()) == 1


def test_it_says_how_many_tokens_are_away_from_their_aims(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hear(
        tmp_path,
        0,
        {"done": 11, "of": 12, "what": "12 tokens away from their aim"},
        {"away": 11, "pushed": 13, "margin": 0.7},
        {"away": 0, "pushed": 0, "margin": 0.7},
    )
    told = "Unlearning: of 13 tokens to be forgotten 11 are more than 0.7 nats from their aims"
    said = capfd.readouterr().err
    assert told in said
    assert "finds no token of the forget set likelier than its aim, so nothing was changed" in said
    assert (tmp_path / FILE_NAME).read_text() == ""
