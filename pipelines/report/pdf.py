"""The page as a PDF, printed by a browser of this machine."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from pipelines.config.schema import ConfigError

# One engine under several names.
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MOST_SECONDS = 120


def find_browser() -> str:
    """Return the path of a browser that prints without a window.

    Raises:
        ConfigError: there is none.
    """
    for name in BROWSERS:
        path = shutil.which(name)
        if path:
            return path
    names = ", ".join(BROWSERS)
    raise ConfigError(
        f"--format: pdf is printed by a browser, and none of these was found: {names}. Install one, "
        "or print report.html from a browser elsewhere"
    )


def headless(browser: str, profile: str) -> list[str]:
    """Return the beginning of a command that opens a page without a window.

    `profile` is a folder for what the browser leaves behind.
    """
    command = [browser, "--headless", "--disable-gpu", f"--user-data-dir={profile}"]
    if os.geteuid() == 0:
        command.append("--no-sandbox")  # the browser refuses to start for root with one
    return command


def write_pdf(page: Path) -> Path:
    """Print a page to a PDF of the same name beside it.

    Raises:
        ConfigError: there is no browser.
        RuntimeError: the browser wrote nothing.
    """
    browser = find_browser()
    path = page.with_suffix(".pdf")
    path.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        command = headless(browser, profile)
        command += ["--no-pdf-header-footer", f"--print-to-pdf={path}", page.resolve().as_uri()]
        printed = subprocess.run(
            command, capture_output=True, timeout=MOST_SECONDS, check=False, text=True
        )
    if not path.exists():
        told = printed.stderr.strip().splitlines() or ["it said nothing"]
        raise RuntimeError(f"{browser} has not printed {page}: {told[-1]}")
    return path
