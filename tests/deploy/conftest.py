"""A real head node with its job server on 127.0.0.1, behind a token."""

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Head(NamedTuple):
    """A running head node: its job server, its token, and where it keeps its logs."""

    address: str
    token: str
    folder: Path

    def get(self, path: str) -> str:
        """What the job server answers to a GET."""
        request = urllib.request.Request(self.address + path, headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read().decode()

    def python(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run Python in a process of its own that has the token."""
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "COLUMNS": "200"}
        settings = {**os.environ, **token, **environment}
        command = [sys.executable, *arguments]
        return subprocess.run(command, env=settings, capture_output=True, text=True, timeout=300, check=False)

    def ray_unlearn(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the command line."""
        return self.python("-m", "pipelines", *arguments, **environment)


@pytest.fixture(scope="session")
def head() -> Iterator[Head]:
    """`ray start --head` with two CPUs, as a user starts it in an activated environment."""
    token = secrets.token_hex(32)
    port, dashboard, client, agent = free_ports(4)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
    }
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as name:  # sockets need a short path
        folder = Path(name)
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus", "2"]
        command += ["--num-gpus", "0", "--port", str(port), "--ray-client-server-port", str(client)]
        command += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)]
        command += ["--dashboard-agent-listen-port", str(agent), "--temp-dir", str(folder)]
        command += ["--object-store-memory", str(200 * 2**20), "--disable-usage-stats"]
        with (folder / "head.log").open("wb") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
        running = Head(f"http://127.0.0.1:{dashboard}", token, folder)
        try:
            _await(running, process)
            yield running
        finally:
            for one in [*psutil.Process(process.pid).children(recursive=True), process]:  # asked nicely, it takes 30 s
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            process.wait(timeout=60)


def _await(head: Head, process: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + 90
    while time.monotonic() < deadline_s and process.poll() is None:
        try:
            head.get("/api/version")
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError((head.folder / "head.log").read_text()[-2000:])
