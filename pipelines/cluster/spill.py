"""A private folder for the objects that Ray moves from a full memory to a disk.

Ray writes them as they are, rows' text with them, for everybody to read, and leaves them behind
when its driver is killed.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = "ray-unlearn-spill"
# Ray reads it when it starts.
VARIABLE = "RAY_object_spilling_directory"
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
    times more, every `linger_s`. A folder that the user has chosen for Ray is left alone.
    """
    if VARIABLE in os.environ:
        yield
        return
    _remove_left_behind()
    folder = tempfile.mkdtemp(prefix=f"{PREFIX}-{os.getpid()}-")  # mode 0700
    # In a session of its own, as Ctrl-C goes to all processes of the terminal's.
    watchdog = subprocess.Popen(
        [sys.executable, "-S", "-c", WATCHDOG, folder, str(linger_s)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.environ[VARIABLE] = folder
    try:
        yield
    finally:
        del os.environ[VARIABLE]
        watchdog.kill()
        watchdog.communicate()
        shutil.rmtree(folder, ignore_errors=True)


def _remove_left_behind() -> None:
    """Remove this user's folders whose process is gone, as after the machine lost its power."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}-*"):
        if folder.stat().st_uid != os.getuid():
            continue
        process = folder.name.removeprefix(f"{PREFIX}-").partition("-")[0]
        try:
            os.kill(int(process), 0)  # which asks whether there is such a process
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
