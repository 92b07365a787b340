"""The commands in docs/cluster.md are commands of ours."""

import re
import shlex
from pathlib import Path

import click
import pytest
import typer

from pipelines.__main__ import app

PAGE = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text()
COMMANDS = re.findall(r"(?:^ +|\()(ray-unlearn [^\n&)]+)", PAGE, re.MULTILINE)


def parse(words: list[str]) -> click.Command:
    """The command that the words reach, with all their options known to it."""
    command: click.Command = typer.main.get_command(app)
    context = None
    while hasattr(command, "commands"):
        context = click.Context(command, parent=context)
        command = command.commands[words.pop(0)]  # pyright: ignore[reportAttributeAccessIssue]
    command.make_context(command.name, words, parent=context)
    return command


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_page_is_understood(line: str) -> None:
    parse(shlex.split(line)[1:])


def test_the_page_shows_every_command_it_is_about() -> None:
    shown = {parse(shlex.split(line)[1:]).name for line in COMMANDS}
    assert shown == {"check", "submit", "status", "logs", "stop", "verify", "gate", "serve"}


def test_every_file_the_page_names_is_there() -> None:
    root = Path(__file__).parents[2]
    for name in re.findall(
        r"(deploy/[\w/.-]+\.yaml|deploy/Dockerfile|cluster\.yaml|constraints\.txt)", PAGE
    ):
        assert (root / name).exists(), name
