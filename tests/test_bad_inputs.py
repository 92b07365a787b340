"""Hundreds of wrong configurations, over all commands: one line that names the key, exit code 2, nothing begun."""

from itertools import cycle
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.__main__ import app
from pipelines.config.text import MESSAGE_CHARS
from tests.bad_inputs import BadInput, bad_inputs

INPUTS = list(bad_inputs())
COMMANDS = {
    "run": [],
    "check": [],
    "check --gpu": ["--gpu", "H100"],
    "finetune": [],
    "tune": ["--trials", "1"],
    "evaluate": ["--model", "none"],
    "submit": ["--address", "http://127.0.0.1:1", "--", "run"],
}


def test_there_are_hundreds() -> None:
    assert len(INPUTS) == len({one.name for one in INPUTS}) >= 300


def told(command: str, given: BadInput, folder: Path) -> tuple[int, str]:
    """Exit code and stderr of a command."""
    config = "quick"
    if given.text is not None:
        config = str(folder / "config.yaml")
        Path(config).write_text(given.text, encoding="utf-8")
    overrides = [f"output_dir={folder}/out", *([given.override] if given.override else [])]
    arguments = [command.split()[0], *COMMANDS[command], config, *overrides]
    result = CliRunner().invoke(app, arguments)
    assert result.stdout == ""
    return result.exit_code, result.stderr


def test_each_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    handled_badly: list[str] = []
    for given, command in zip(INPUTS, cycle(COMMANDS), strict=False):
        code, line = told(command, given, tmp_path)
        is_line = line.count("\n") == 1 and line.endswith("\n") and len(line) <= MESSAGE_CHARS + 1
        if code != 2 or not is_line or not line[:-1].isprintable() or given.named not in line:
            handled_badly.append(f"{command} {given.name}: {code} {line!r}")
    assert not handled_badly, f"{len(handled_badly)} of {len(INPUTS)}:\n" + "\n".join(handled_badly)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_a_key_given_twice(command: str, tmp_path: Path) -> None:
    text = "data:\n  forget: {path: one.jsonl}\n  forget: {path: other.jsonl}\n"
    code, line = told(command, BadInput("twice", text=text), tmp_path)
    assert code == 2
    assert line == (
        f"{tmp_path}/config.yaml: not a configuration: line 3: found the key forget a second time\n"
    )
