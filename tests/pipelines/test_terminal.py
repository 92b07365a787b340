"""A command's exceptions become one line on stderr and an exit code; chatter goes to the log."""

import os
from pathlib import Path

import pytest
import ray
import typer

from pipelines import terminal as terminal_module
from pipelines.config.load import short_hash
from pipelines.config.schema import ConfigError
from pipelines.config.text import MESSAGE_CHARS, one_line
from pipelines.places import place_in
from pipelines.terminal import reporting


@pytest.mark.parametrize(
    "error, code, line",
    [
        (ConfigError("seed: missing"), 2, "seed: missing"),
        (KeyboardInterrupt(), 130, "Stopped. It goes on from the last resume point."),
        (RuntimeError(" a reason\nand its traceback"), 1, "Failed: RuntimeError: a reason."),
        (ValueError(), 1, "Failed: ValueError."),
    ],
)
def test_an_exception_is_one_line_and_an_exit_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as exit_, reporting(debug=False, going_on="It goes on"):
        raise error
    assert exit_.value.exit_code == code
    assert capsys.readouterr().err == f"{line}\n"


def test_a_failure_is_one_line_of_limited_length(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), reporting(debug=False):
        raise OSError(36, "File name too long", "a" * 5000)
    told = capsys.readouterr().err
    assert told.startswith("Failed: OSError: [Errno 36] File name too long: 'aaa")
    assert len(told) <= MESSAGE_CHARS + 1


def test_a_message_masks_passwords_wherever_a_uri_has_them() -> None:
    uris = "http://me:word@host/x postgresql://h/db?user=a&password=word&sslmode=no"
    assert one_line(uris) == "http://host/x postgresql://h/db?user=a&password=...&sslmode=no"


def test_a_place_is_the_innermost_frame_of_this_project() -> None:
    frames = ("pipelines/a/b.py", "rfa/c.py", "venv/site-packages/rfa/d.py", "tests/rfa/e.py")
    text = "".join(f'  File "/home/{name}", line 7, in f\n    g()\n' for name in frames)
    assert place_in(text) == "rfa/c.py, line 7"
    assert place_in('  File "/home/pipelines/terminal.py", line 7') == ""


def test_scores_stand_with_the_oracles_spread_and_with_their_interval(
    capsys: pytest.CaptureFixture[str],
) -> None:
    models = {
        "after": {"forget.token_distance": 0.98, "forget.rouge": 0.25},
        "oracle": {"forget.token_distance": 0.065, "forget.rouge": 0.2},
    }
    labels = {"forget.token_distance": "Forget: token distance", "forget.rouge": "Forget: ROUGE-L"}
    spread = {"forget.token_distance": 0.01}
    with reporting(debug=True) as terminal:
        terminal.scores({"models": models, "oracle_spread": spread}, labels)
        intervals = {"after": {"forget.rouge": [0.2, 0.315]}}
        terminal.scores({"models": models, "intervals": intervals}, labels)
    several, one = capsys.readouterr().err.split("Scores")[1:]
    assert "0.065 ± 0.005" in several
    assert several.count("±") == 1, "no spread is known of ROUGE-L"
    assert "0.065" in one
    assert "±" not in one
    assert "0.250 (0.20 to 0.32)" in one


def test_debug_shows_the_exception_itself() -> None:
    with pytest.raises(ConfigError, match="seed"), reporting(debug=True):
        raise ConfigError("seed: missing")


def test_a_command_chooses_its_own_exit_code() -> None:
    with pytest.raises(typer.Exit) as exit_, reporting(debug=False):
        raise typer.Exit(3)
    assert exit_.value.exit_code == 3


def test_a_failure_names_the_log_that_the_chatter_went_to(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "run" / "run.log"
    with (
        pytest.raises(typer.Exit),
        reporting(debug=False) as terminal,
        terminal.chatter_to(log),
    ):
        os.write(1, b"from a library\n")
        os.write(2, b"and its warning\n")
        terminal.say("for the user")
        raise OSError("disk full")
    assert log.read_text() == "from a library\nand its warning\n"
    failure = f"Failed: OSError: disk full; the log is {log}."
    assert capfd.readouterr().err == f"for the user\n{failure}\n"


def test_a_file_gets_a_line_of_progress_with_the_time_left(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(terminal_module.time, "monotonic", lambda: now[0])
    with reporting(debug=True) as terminal, terminal.chatter_to(tmp_path / "run.log"):
        bar = terminal.bar("Fine-tuning", 8)
        for seconds in (4, 8, 1, 2):
            now[0] += seconds
            bar.advance(note="loss 0.500")
        # It goes on from a resume point, where a step takes 10 s: what came before says nothing.
        for step in (900, 901, 902):
            now[0] += 10
            bar.at(step, total=1000)
        bar.finish()
    told = capfd.readouterr().err
    # One step was too early for a line, and two came too soon after one.
    assert "Fine-tuning ...\nFine-tuning: 2 of 8, about 48 s left (loss 0.500)\n" in told
    assert "Fine-tuning: 901 of 1000, about 990 s left\n" in told
    assert "Fine-tuning: 902 of 1000, about 980 s left\n" in told


def test_a_failed_task_is_told_by_its_innermost_exception_and_place(
    capsys: pytest.CaptureFixture[str], ray_session: None
) -> None:
    @ray.remote
    def fails() -> None:
        short_hash(None)  # pyright: ignore[reportArgumentType]

    with pytest.raises(typer.Exit), reporting(debug=False):
        ray.get(fails.remote())
    told = capsys.readouterr().err
    assert told.startswith("Failed: AttributeError: 'NoneType' object has no attribute 'encode' (")
    assert "(config/load.py, line " in told
    assert told.count("\n") == 1
