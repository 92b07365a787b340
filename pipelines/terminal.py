"""The output on the terminal: progress, tables, one-line errors. The log has the rest."""

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from pipelines.config.schema import ConfigError
from pipelines.config.text import escaped, one_line
from pipelines.places import place_in

LINE_S = 10.0  # between two lines about progress, where there is no bar
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
RunDir = Annotated[str, typer.Argument(metavar="RUN_DIR", help="The output_dir of a finished run.")]


class Terminal:
    """The user's terminal, on stderr.

    Within `chatter_to` file descriptors 1 and 2 are the log, which Ray, DeepSpeed and MLflow fill.
    """

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress: Progress | None = None
        self.log_path: Path | None = None

    @contextmanager
    def chatter_to(self, log_path: Path) -> Iterator[None]:
        """Send all output but this object's messages to a log file within the scope."""
        log_path.parent.mkdir(parents=True, exist_ok=True)
        self.log_path = log_path
        terminal = self._console
        width = terminal.width if terminal.is_terminal else 120
        with log_path.open("ab") as log, _redirected(log.fileno()) as stderr:
            self._console = Console(file=stderr, width=width)
            self._progress = Progress(
                TextColumn("{task.description:<28}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self._console,
            )
            try:
                yield
            finally:
                # Stopping a display without bars prints an empty line.
                if self._progress.tasks:
                    self._progress.stop()
                self._console, self._progress = terminal, None

    def say(self, text: str) -> None:
        """Print one line, with control characters escaped."""
        self._console.print(escaped(text), markup=False, highlight=False, soft_wrap=True)

    def last_words(self, text: str) -> None:
        """Print one line below all bars, before the process ends without its usual steps."""
        if self._progress is not None and self._progress.tasks:
            self._progress.stop()
        self.say(text)

    def bar(self, description: str, total: int | None) -> "Bar":
        """Start a progress bar with the time left. `total` is None while it is unknown."""
        assert self._progress is not None
        self._progress.start()
        task = self._progress.add_task(description, total=total, note="")
        if self._console.is_terminal:
            return Bar(self._progress, task)
        # A file or a pipe shows no bar until its end: it gets lines.
        self.say(f"{description} ...")
        return Bar(self._progress, task, self.say)

    def table(self, title: str, rows: list[tuple[str, str]]) -> None:
        """Print names and their values."""
        table = Table("", "", title=title, title_justify="left", show_header=False)
        for row in rows:
            table.add_row(*map(escaped, row))
        self._console.print(table)

    def scores(self, scores: Mapping[str, Any], labels: Mapping[str, str]) -> None:
        """Print the scores that have a label, one column per model, of a score file's content.

        Beside the mean of several oracles stands half of their spread, and beside other models'
        scores the 95 % interval over rows.
        """
        table = Table("", title="Scores", title_justify="left")
        models, spread = scores["models"], scores.get("oracle_spread", {})
        intervals = scores.get("intervals", {})
        for name in models:
            table.add_column(name, justify="right")
        for key, label in labels.items():
            cells: list[str] = []
            for name, entry in models.items():
                value = (entry or {}).get(key)
                cell = "-" if value is None else f"{value:.3f}"
                if name == "oracle" and key in spread:
                    cell += f" ± {spread[key] / 2:.3f}"
                elif name not in ("oracle", "before") and key in intervals.get(name, {}):
                    low, high = intervals[name][key]
                    cell += f" ({low:.2f} to {high:.2f})"
                cells.append(cell)
            if set(cells) != {"-"}:
                table.add_row(label, *cells)
        self._console.print(table)


class Bar:
    """One progress bar; with `say` also a line every LINE_S seconds."""

    def __init__(
        self, progress: Progress, task: TaskID, say: Callable[[str], None] | None = None
    ) -> None:
        self._progress, self._task, self._say = progress, task, say
        self._said_s = time.monotonic()
        # Where the rate is counted from: time, steps done, and steps in all.
        self._since = (self._said_s, 0.0, None)

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count steps as done."""
        self._progress.update(self._task, advance=steps, note=note)
        self._tell()

    def at(self, done: int, *, total: int, note: str = "") -> None:
        """Set the number of steps done, and of all steps."""
        self._progress.update(self._task, completed=done, total=total, note=note)
        self._tell()

    def finish(self) -> None:
        """Fill the bar."""
        total = self._progress.tasks[self._task].total or 1
        self._progress.update(self._task, total=total, completed=total, note="")

    def _tell(self) -> None:
        """Say how far it has come and how long the rest will take, if there was no line lately."""
        task, now_s = self._progress.tasks[self._task], time.monotonic()
        since_s, done, total = self._since
        # The first step, another phase, or a run that goes on where it was: what came before (the
        # workers' start, too) says nothing of it.
        if total != task.total or task.completed < done:
            since_s, done = now_s, task.completed
            self._since = (since_s, done, task.total)
        if self._say is None or now_s - self._said_s < LINE_S or not task.total:
            return
        self._said_s = now_s
        line = f"{task.description}: {task.completed:g} of {task.total:g}"
        if task.completed > done and now_s > since_s:
            left_s = (now_s - since_s) * (task.total - task.completed) / (task.completed - done)
            line += f", about {left_s:.0f} s left"
        note = task.fields["note"]
        self._say(f"{line} ({note})" if note else line)


@contextmanager
def reporting(debug: bool, going_on: str = "The same command goes on") -> Iterator[Terminal]:
    """Give a command its terminal, and turn an exception into one line and an exit code.

    Args:
        debug: whether to let an exception through, with its traceback.
        going_on: the way to continue after Ctrl-C, for the line about it.

    Raises:
        typer.Exit: 2 for wrong input, 130 for Ctrl-C, 1 for any other failure. One that the
            command raises passes.
    """
    terminal = Terminal()
    try:
        yield terminal
    except typer.Exit:
        raise
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        log = "" if terminal.log_path is None else f"; the log is {terminal.log_path}"
        # 130 is a shell's code for SIGINT: 128 and the signal's number.
        match error:
            case ConfigError():
                code, line = 2, str(error)
            case KeyboardInterrupt():
                code, line = 130, f"Stopped. {going_on} from the last resume point{log}."
            case _:
                code, line = 1, f"Failed: {_reason(error)}{log}."
        terminal.say(one_line(line))
        raise typer.Exit(code) from None


def _reason(error: BaseException) -> str:
    """Say what failed: the innermost exception's type, its first line, and where it was raised."""
    # A task's error has a traceback as its text, and the exception inside.
    place = place_in("".join(traceback.format_tb(error.__traceback__)) + str(error))
    inner = getattr(error, "cause", None)
    if isinstance(inner, BaseException):
        error = inner
    reason = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
    if place:
        reason += f" ({place}; --debug shows the rest)"
    return reason


@contextmanager
def _redirected(log: int) -> Iterator[TextIO]:
    """Point file descriptors 1 and 2 at `log`, and yield a stream to where 2 pointed."""
    # Replacing `sys.stderr` would not do, as child processes and native code write to descriptors.
    sys.stdout.flush()
    sys.stderr.flush()
    stdout, stderr = os.dup(1), os.dup(2)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        with os.fdopen(os.dup(stderr), "w") as stream:
            yield stream
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        os.close(stdout)
        os.close(stderr)
