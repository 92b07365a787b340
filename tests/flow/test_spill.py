"""Rows that Ray moves to a disk, where its memory is full: who can read them, and when they go."""

import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from pipelines.cluster.spill import LOCK, PREFIX, VARIABLE, private_spilling

# More rows than its object store holds.
FULL = """
import os, time
import ray
from pipelines.cluster.spill import VARIABLE, private_spilling
with private_spilling(linger_s=0.2):
    ray.init("local", num_cpus=1, object_store_memory=80 * 2**20, include_dashboard=False)
    rows = [ray.put(b"forget me" * 2**20) for _ in range(16)]
    print(os.environ[VARIABLE], flush=True)
    time.sleep(100)
"""


def test_spilled_rows_are_private_and_go_with_a_killed_command() -> None:
    command = [sys.executable, "-c", FULL]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        spilled = [path for path in folder.rglob("*") if path.is_file()]
        assert any(b"forget me" in path.read_bytes() for path in spilled)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not folder.exists()


def test_what_nobody_holds_is_removed_and_a_folder_of_the_users_choice_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    left = Path(tempfile.mkdtemp(prefix=PREFIX))
    (left / LOCK).touch()
    with private_spilling():
        assert not left.exists()
        own = Path(os.environ.pop(VARIABLE))
        with private_spilling():
            assert own.is_dir(), "a running command holds it"
        os.environ[VARIABLE] = str(own)
    assert not own.exists()
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with private_spilling():
        assert os.environ[VARIABLE] == str(tmp_path)
    assert tmp_path.is_dir()
