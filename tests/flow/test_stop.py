"""A command that is ended from outside: one line on the terminal that says so."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from pipelines.cluster.session import CHOSEN
from tests.processes import kill_tree


@contextmanager
def started(*arguments: str, told: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command in a process of its own, whose stderr goes to a file."""
    # Ray's first start in this process has set some.
    environment = {key: value for key, value in os.environ.items() if key not in CHOSEN}
    with told.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipelines", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=stream,
            env={**environment, "RAY_ADDRESS": "local", "COLUMNS": "200"},
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            kill_tree(psutil.Process(process.pid))
            process.wait()


def raylet_of(process: subprocess.Popen[bytes], *, timeout_s: float = 120) -> psutil.Process:
    """Wait for the raylet that a command starts."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until and process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                # While a process is being started it has a name and no environment yet.
                if child.name() == "raylet" and child.environ():
                    return child
        time.sleep(0.02)
    raise AssertionError(f"no raylet; exit code {process.poll()}")


def test_sigterm_while_ray_starts_is_told(overrides: list[str], tmp_path: Path) -> None:
    told = tmp_path / "told"
    arguments = ["check", "quick", *overrides, f"output_dir={tmp_path}/out"]
    with started(*arguments, told=told) as process:
        raylet = raylet_of(process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130, told.read_text()
    line = told.read_text()
    assert line.startswith("Stopped. The same command goes on from the last resume point; the log")
    assert line.count("\n") == 1
    raylet.wait(30)


def test_the_end_of_rays_own_process_is_told(overrides: list[str], tmp_path: Path) -> None:
    told = tmp_path / "told"
    out = tmp_path / "out"
    with started("run", "quick", *overrides, f"output_dir={out}", told=told) as process:
        raylet = raylet_of(process)
        assert len(raylet.environ()["RAY_AUTH_TOKEN"]) == 64, "its own, in no file"
        until = time.monotonic() + 120
        while b"Data:" not in told.read_bytes() and time.monotonic() < until:
            time.sleep(0.1)
        raylet.kill()
        assert process.wait(60) == 1, told.read_text()
    last = told.read_text().splitlines()[-1]
    assert last == (
        "Failed: Ray's raylet on this machine ended, as for want of memory; "
        f"the log is {out}/run.log."
    )
