"""Real clusters on this machine, as a user starts them: `ray start`, behind a token, the job server on 127.0.0.1."""

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from pyarrow import fs

from tests.bucket import Bucket, running_bucket
from tests.processes import kill_tree

# A lost node is noticed after 3 s, not 15, and workers that cannot start there are given up after 30 s, not 60.
SOONER = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
}


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
    """A running head node: its job server, the cluster's address and token, and where it keeps its logs."""

    address: str
    port: int
    token: str
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """What talks to the cluster has this in its environment."""
        path = (
            f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # as in an activated environment
        )
        own = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "XDG_CACHE_HOME": f"{self.folder}/cache",
        }
        return {**os.environ, **own, **SOONER, "PATH": path, "COLUMNS": "200"}

    def get(self, path: str) -> str:
        """What the job server answers to a GET."""
        request = urllib.request.Request(
            self.address + path, headers={"Authorization": f"Bearer {self.token}"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read().decode()

    def python(self, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        """Run Python in a process of its own that has the token."""
        command, settings = [sys.executable, *arguments], {**self.environment, **changes}
        return subprocess.run(
            command, env=settings, capture_output=True, text=True, timeout=600, check=False
        )

    def ray_unlearn(self, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        """Run the command line."""
        return self.python("-m", "pipelines", *arguments, **changes)

    @contextmanager
    def ray_start(self, *options: str) -> Iterator[psutil.Process]:
        """A node, until the end of the block or until it is killed."""
        command = [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--block",
            "--num-gpus",
            "0",
            *options,
        ]
        command += ["--object-store-memory", str(200 * 2**20), "--disable-usage-stats"]
        with (self.folder / "nodes.log").open("ab") as log:
            process = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, cwd=self.folder
            )
        try:
            yield psutil.Process(process.pid)
        finally:
            kill_tree(psutil.Process(process.pid))
            process.wait(timeout=60)


@contextmanager
def running_head(cpus: int) -> Iterator[Head]:
    """A head node that answers."""
    port, dashboard, client, agent = free_ports(4)
    with tempfile.TemporaryDirectory(
        prefix="ray", ignore_cleanup_errors=True
    ) as name:  # sockets need a short path
        head = Head(f"http://127.0.0.1:{dashboard}", port, secrets.token_hex(32), Path(name))
        options = [
            "--head",
            "--num-cpus",
            str(cpus),
            "--port",
            str(port),
            "--ray-client-server-port",
            str(client),
        ]
        options += [
            "--dashboard-host",
            "127.0.0.1",
            "--dashboard-port",
            str(dashboard),
            "--temp-dir",
            name,
        ]
        with head.ray_start(*options, "--dashboard-agent-listen-port", str(agent)) as process:
            deadline_s = time.monotonic() + 90
            while True:
                try:
                    head.get("/api/version")
                    break
                except OSError:
                    if time.monotonic() > deadline_s or not process.is_running():
                        raise RuntimeError(
                            (head.folder / "nodes.log").read_text()[-2000:]
                        ) from None
                    time.sleep(0.2)
            yield head


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A cluster of one node with two CPUs."""
    with running_head(2) as running:
        yield running


@pytest.fixture(scope="session")
def bucket(problem: Path) -> Iterator[Bucket]:
    """An S3 server, with the problem's data in s3://bucket/data."""
    with running_bucket() as server:
        fs.copy_files(str(problem / "data"), "bucket/data", destination_filesystem=server.s3)
        yield server


@pytest.fixture(scope="session")
def keys(bucket: Bucket, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the variables that it takes to use the bucket."""
    file = tmp_path_factory.mktemp("keys") / "keys.env"
    file.write_text("".join(f"{name}={value}\n" for name, value in bucket.environment.items()))
    return file
