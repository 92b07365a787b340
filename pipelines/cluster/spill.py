"""A private folder for the objects that Ray moves from a full memory to a disk.

Ray writes them as they are, rows' text with them, for everybody to read, and leaves them behind
when its driver is killed.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "ray-unlearn-spill-"
LOCK = "in-use"  # held by the command
# Ray reads it when it starts.
VARIABLE = "RAY_object_spilling_directory"
# By these a user tells Ray where to spill.
CHOSEN = (VARIABLE, "RAY_object_spilling_config")
# Its input ends with the process that started it, however that ends. Ray's own processes notice a
# little later, and may write until then.
WATCHDOG = """
import shutil, sys, time
sys.stdin.read()
for _ in range(30):
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    time.sleep(float(sys.argv[2]))
"""


@contextmanager
def private_spilling(*, linger_s: float = 1.0) -> Iterator[None]:
    """Let a Ray that starts within spill into a folder that only this user can read.

    The folder is removed at the end, and by a watchdog if this process is killed: at once and 30
    times more, every `linger_s`. Where the user has told Ray where to spill, nothing is changed.
    """
    if any(name in os.environ for name in CHOSEN):
        yield
        return
    parent = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    _remove_left_behind(Path(parent))
    folder = tempfile.mkdtemp(prefix=PREFIX, dir=parent)  # mode 0700
    # In a session of its own, as Ctrl-C goes to all processes of the terminal's.
    watchdog = subprocess.Popen(
        [sys.executable, "-S", "-c", WATCHDOG, folder, str(linger_s)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    with (Path(folder) / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.environ[VARIABLE] = folder
        try:
            yield
        finally:
            del os.environ[VARIABLE]
            # The watchdog stays until all is removed: this process may be killed in between.
            shutil.rmtree(folder, ignore_errors=True)
            watchdog.kill()
            watchdog.communicate()


def _remove_left_behind(parent: Path) -> None:
    """Remove this user's folders that no process holds, as after the machine lost its power."""
    for folder in parent.glob(f"{PREFIX}*"):
        # Another command may remove it at the same time, or hold its lock, which a process number
        # would not tell of other containers.
        with suppress(OSError), (folder / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
