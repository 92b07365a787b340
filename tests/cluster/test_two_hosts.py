"""Training over two hosts: network namespaces that share nothing but a cable, each with a Ray node of its own."""

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest

CABLE = "eth0"  # the name of both of its ends


def ip(*arguments: str) -> str:
    """What `ip` tells."""
    command = ["ip", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


class Host(NamedTuple):
    """A network namespace with an address on the cable, and a folder for its Ray node."""

    name: str
    address: str
    folder: Path

    def python(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run Python on this host."""
        command = ["ip", "netns", "exec", self.name, sys.executable, *arguments]
        environment = {**os.environ, "COLUMNS": "200", **settings}
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=900, check=False
        )

    def start_ray(self, *options: str, **settings: str) -> None:
        """Start a Ray node that stays."""
        own = [
            "--num-cpus",
            "2",
            "--num-gpus",
            "0",
            "--node-ip-address",
            self.address,
            "--temp-dir",
            str(self.folder),
        ]
        own += ["--object-store-memory", str(200 * 2**20), "--disable-usage-stats"]
        done = self.python("-m", "ray.scripts.scripts", "start", *own, *options, **settings)
        assert done.returncode == 0, done.stdout + done.stderr

    @contextmanager
    def standing(self) -> Iterator[None]:
        """The namespace, until the end of the block; with it ends all that runs there."""
        ip("netns", "add", self.name)
        try:
            ip("-n", self.name, "link", "set", "lo", "up")
            yield
        finally:
            for process in ip("netns", "pids", self.name).split():
                with suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
            ip("netns", "del", self.name)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts with a cable between them."""
    if shutil.which("ip") is None:
        pytest.skip("two hosts need network namespaces: there is no `ip` here")
    with ExitStack() as stack:
        folders = [
            tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) for _ in range(2)
        ]
        one, two = (
            Host(
                f"ray-{os.getpid()}-{number}",
                f"10.213.0.{number}",
                Path(stack.enter_context(folder)),
            )
            for number, folder in enumerate(folders, start=1)
        )
        try:
            for host in (one, two):
                stack.enter_context(host.standing())
            ip(
                "link",
                "add",
                CABLE,
                "netns",
                one.name,
                "type",
                "veth",
                "peer",
                "name",
                CABLE,
                "netns",
                two.name,
            )
            for host in (one, two):
                ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", CABLE)
                ip("-n", host.name, "link", "set", CABLE, "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"two hosts need network namespaces: {error.stderr.strip()}")
        yield one, two


def test_two_hosts_train_together(
    hosts: tuple[Host, Host], overrides: list[str], tmp_path: Path
) -> None:
    head, other = hosts
    # The hosts' own name is an address of their loopback here, which gloo would tell the other one.
    settings = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "GLOO_SOCKET_IFNAME": CABLE,
    }
    head.start_ray("--head", "--port", "6379", "--include-dashboard", "false", **settings)
    other.start_ray("--address", f"{head.address}:6379", **settings)
    # A worker takes 1.5 of a host's 2 CPUs: there is one on each.
    changes = [
        "train.num_workers=2",
        "train.cpus_per_worker=1.5",
        "train.steps=2",
        "evaluation.quick=true",
    ]
    command = [
        "-m",
        "pipelines",
        "run",
        "quick",
        *overrides,
        *changes,
        f"output_dir={tmp_path}/out",
    ]
    done = head.python(*command, **settings, RAY_ADDRESS=f"{head.address}:6379")
    log = (
        (tmp_path / "out" / "run.log").read_text()
        if (tmp_path / "out" / "run.log").exists()
        else ""
    )
    assert done.returncode == 0, done.stderr + log[-5000:]
    workers = re.findall(r"\(ip=(\S+), pid=\d+\) world_rank=(\d)", log)
    assert {address for address, _ in workers} == {head.address, other.address}, workers
    results = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert results["cost"]["num_workers"] == 2
    assert 0 < results["models"]["after"]["forget.probability"] < 1
