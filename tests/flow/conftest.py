"""The `quick` preset on a tiny problem, and the command line as a user starts it."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from typer.testing import CliRunner

from pipelines.__main__ import app
from pipelines.config.load import load_config
from pipelines.config.schema import UnlearnConfig

Command = Callable[..., subprocess.CompletedProcess[str]]
CommandHere = Callable[..., tuple[int, str]]


@pytest.fixture(scope="session")
def quick(overrides: list[str]) -> Callable[..., UnlearnConfig]:
    """The `quick` preset on the problem, with changes."""

    def load(*changes: str) -> UnlearnConfig:
        return load_config("quick", [*overrides, *changes])

    return load


@pytest.fixture(scope="session")
def command() -> Command:
    """Runs `ray-unlearn` in a process of its own."""

    def run(*arguments: str, timeout_s: int = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pipelines", *arguments],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env={
                **os.environ,
                "COLUMNS": "200",
                "RAY_ADDRESS": "local",
            },  # no cluster left on this machine is joined
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def command_here(ray_session: None) -> CommandHere:
    """Runs `ray-unlearn` in this process and on its Ray, which saves the 15 s and more that a start takes; gives the
    exit code and what was told at the end. Settings of the environment are named."""

    def run(*arguments: str, **environment: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", **environment})
        return result.exit_code, result.output

    return run
