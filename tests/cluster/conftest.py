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
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs

SECRET = "wJalrXUtnFEMI-K7MDENG"


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
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # as in an activated environment
        return {**os.environ, "PATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "COLUMNS": "200"}

    def get(self, path: str) -> str:
        """What the job server answers to a GET."""
        request = urllib.request.Request(self.address + path, headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read().decode()

    def python(self, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        """Run Python in a process of its own that has the token."""
        command, settings = [sys.executable, *arguments], {**self.environment, **changes}
        return subprocess.run(command, env=settings, capture_output=True, text=True, timeout=300, check=False)

    def ray_unlearn(self, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        """Run the command line."""
        return self.python("-m", "pipelines", *arguments, **changes)

    @contextmanager
    def ray_start(self, *options: str) -> Iterator[psutil.Process]:
        """A node, until the end of the block or until it is killed."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-gpus", "0", *options]
        command += ["--object-store-memory", str(200 * 2**20), "--disable-usage-stats"]
        with (self.folder / "nodes.log").open("ab") as log:
            process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, cwd=self.folder)
        try:
            yield psutil.Process(process.pid)
        finally:
            kill_tree(psutil.Process(process.pid))
            process.wait(timeout=60)


def kill_tree(process: psutil.Process) -> None:
    """End a node at once, with all that it started; asked nicely, it would take half a minute."""
    for one in [*process.children(recursive=True), process]:
        with suppress(psutil.NoSuchProcess):
            one.kill()


@contextmanager
def running_head(cpus: int) -> Iterator[Head]:
    """A head node that answers."""
    port, dashboard, client, agent = free_ports(4)
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as name:  # sockets need a short path
        head = Head(f"http://127.0.0.1:{dashboard}", port, secrets.token_hex(32), Path(name))
        options = ["--head", "--num-cpus", str(cpus), "--port", str(port), "--ray-client-server-port", str(client)]
        options += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard), "--temp-dir", name]
        with head.ray_start(*options, "--dashboard-agent-listen-port", str(agent)) as process:
            deadline_s = time.monotonic() + 90
            while True:
                try:
                    head.get("/api/version")
                    break
                except OSError:
                    if time.monotonic() > deadline_s or not process.is_running():
                        raise RuntimeError((head.folder / "nodes.log").read_text()[-2000:]) from None
                    time.sleep(0.2)
            yield head


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A cluster of one node with two CPUs."""
    with running_head(2) as running:
        yield running


@pytest.fixture(scope="session")
def keys(problem: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The problem's data in s3://bucket/data of an S3 server; a file of the variables that it takes to read it."""
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    s3 = fs.S3FileSystem(
        scheme="http", endpoint_override=f"{host}:{port}", access_key="key", secret_key=SECRET,
        allow_bucket_creation=True, background_writes=False,
    )  # fmt: skip
    s3.create_dir("bucket")
    fs.copy_files(str(problem / "data"), "bucket/data", destination_filesystem=s3)
    file = tmp_path_factory.mktemp("keys") / "keys.env"
    own = f"AWS_ACCESS_KEY_ID=key\nAWS_SECRET_ACCESS_KEY={SECRET}\nAWS_DEFAULT_REGION=us-east-1\n"
    file.write_text(f"AWS_ENDPOINT_URL_S3=http://{host}:{port}\n{own}")
    yield file
    server.stop()
