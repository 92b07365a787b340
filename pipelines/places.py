"""Where in this project's own code an exception was raised, read off a traceback's text."""

import re
from pathlib import Path

FRAME = re.compile(r'File "([^"]+)", line (\d+)')
# Files of this project, among the frames of a traceback.
OWN = re.compile(r"^(?!.*/(tests|site-packages)/).*/(pipelines|rfa|tuning|deploy)/.*\.py$")
# Every traceback goes through it.
TERMINAL = "pipelines/terminal.py"


def place_in(traceback: str) -> str:
    """Return the innermost own place, as `config/load.py, line 7`, or '' without one."""
    own = [
        (path, line)
        for path, line in FRAME.findall(traceback)
        if OWN.search(path) and not path.endswith(TERMINAL)
    ]
    if not own:
        return ""
    path, line = own[-1]
    return f"{'/'.join(Path(path).parts[-2:])}, line {line}"
