"""What the driver records of a run's steps."""

import json
from pathlib import Path

import pytest

from pipelines.storage.output import OutputDir
from pipelines.terminal import Terminal
from pipelines.training.progress import FILE_NAME, ProgressLog


def test_a_run_goes_on_behind_the_last_whole_line_of_a_killed_one(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text('{"step": 0, "loss": 2.0}\n{"step": 1, "lo')
    terminal = Terminal()
    with (
        terminal.chatter_to(tmp_path / "run.log"),
        ProgressLog(OutputDir(str(tmp_path)), "Unlearning", 3, terminal) as log,
    ):
        log.on_message({"step": 1, "loss": 1.0})
    lines = (tmp_path / FILE_NAME).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1]


def test_it_says_after_how_many_steps_enough_was_forgotten(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal()
    with (
        terminal.chatter_to(tmp_path / "run.log"),
        ProgressLog(OutputDir(str(tmp_path)), "Unlearning", 3, terminal) as log,
    ):
        log.on_message({"step": 0, "loss": 1.0})
        log.on_message({"stopped_after": 2})
    assert "Unlearning: 2 of 3 steps were enough (objective.stop_at)" in capfd.readouterr().err
    assert len((tmp_path / FILE_NAME).read_text().splitlines()) == 1


def test_it_says_how_many_tokens_are_away_from_their_aims(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal()
    with (
        terminal.chatter_to(tmp_path / "run.log"),
        ProgressLog(OutputDir(str(tmp_path)), "Unlearning", 0, terminal) as log,
    ):
        log.on_message({"done": 11, "of": 12, "what": "12 tokens away from their aim"})
        log.on_message({"away": 11, "pushed": 13, "margin": 0.7})
        log.on_message({"away": 0, "pushed": 0, "margin": 0.7})
    told = "Unlearning: of 13 tokens to be forgotten 11 are more than 0.7 nats from their aims"
    said = capfd.readouterr().err
    assert told in said
    assert "finds no token of the forget set likelier than its aim, so nothing was changed" in said
    assert (tmp_path / FILE_NAME).read_text() == ""
