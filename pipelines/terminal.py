"""What a person at the terminal sees: progress and a result table on stderr. All chatter goes to the run's log."""

import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from pipelines.config.schema import ConfigError

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
RunDir = Annotated[str, typer.Argument(metavar="RUN_DIR", help="The output_dir of a finished run.")]


class Terminal:
    """The user's terminal, while file descriptors 1 and 2 write to the log: Ray, DeepSpeed and MLflow speak there."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress: Progress | None = None
        self.log_path: Path | None = None

    @contextmanager
    def chatter_to(self, log_path: Path) -> Iterator[None]:
        """Send everything but our own messages to a log file."""
        log_path.parent.mkdir(parents=True, exist_ok=True)
        self.log_path = log_path
        sys.stdout.flush()
        sys.stderr.flush()
        own = os.dup(2), os.dup(1)
        with log_path.open("ab") as log, os.fdopen(os.dup(own[0]), "w") as stream:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            before = self._console
            self._console = Console(file=stream, width=before.width if before.is_terminal else 120)
            self._progress = Progress(
                TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=self._console,
            )  # fmt: skip
            try:
                yield
            finally:
                if self._progress.tasks:  # else it would end with an empty line
                    self._progress.stop()
                sys.stdout.flush()
                sys.stderr.flush()
                os.dup2(own[0], 2)
                os.dup2(own[1], 1)
                for descriptor in own:
                    os.close(descriptor)
                self._console, self._progress = before, None

    def say(self, text: str) -> None:
        """One line to the user."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def bar(self, description: str, total: int | None) -> "Bar":
        """A progress bar with time left; `total` None while it is not known."""
        assert self._progress is not None
        self._progress.start()
        if not self._console.is_terminal:
            self.say(f"{description} ...")
        return Bar(self._progress, self._progress.add_task(description, total=total, note=""))

    def table(self, title: str, rows: list[tuple[str, str]]) -> None:
        """Two columns: what, and its value."""
        table = Table("", "", title=title, title_justify="left", show_header=False)
        for row in rows:
            table.add_row(*row)
        self._console.print(table)

    def scores(self, models: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str]) -> None:
        """Print the scores that have a label, a column a model."""
        table = Table(title="Scores", title_justify="left")
        table.add_column("")
        for name in models:
            table.add_column(name, justify="right")
        for key, label in labels.items():
            values = [scores.get(key) for scores in models.values()]
            if any(value is not None for value in values):
                table.add_row(
                    label, *("-" if value is None else f"{value:.3f}" for value in values)
                )
        self._console.print(table)


class Bar:
    """One line of progress."""

    def __init__(self, progress: Progress, task: Any) -> None:
        self._progress, self._task = progress, task

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count steps as done."""
        self._progress.update(self._task, advance=steps, note=note)

    def at(self, done: int, *, total: int, note: str = "") -> None:
        """Set how many steps of how many are done."""
        self._progress.update(self._task, completed=done, total=total, note=note)

    def finish(self) -> None:
        """Fill the bar."""
        total = self._progress.tasks[self._task].total
        self._progress.update(self._task, total=total or 1, completed=total or 1, note="")


Action = Callable[[Terminal], None]


def guarded(
    going_on: str = "The same command goes on",
) -> Callable[[Callable[..., Action]], Callable[..., None]]:
    """Make a command of a function that says what to do: it gets the option --debug, and what goes wrong becomes one
    line and an exit code. `going_on` says how to go on after Ctrl-C."""

    def decorate(command: Callable[..., Action]) -> Callable[..., None]:
        @wraps(command)
        def run(*, debug: bool, **options: Any) -> None:
            _guard(command(**options), debug=debug, going_on=going_on)

        option = inspect.Parameter(
            "debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug
        )
        own = inspect.signature(command).parameters.values()
        vars(run)["__signature__"] = inspect.Signature(
            [*own, option]
        )  # which typer reads the options from
        run.__annotations__ = {**command.__annotations__, "debug": Debug}
        return run

    return decorate


def _guard(action: Action, *, debug: bool, going_on: str) -> None:
    """Do it; a command's own `typer.Exit` stands."""
    terminal = Terminal()
    try:
        action(terminal)
    except typer.Exit:
        raise
    except (ConfigError, KeyboardInterrupt, Exception) as error:
        if debug:
            raise
        log = f"; the log is {terminal.log_path}" if terminal.log_path is not None else ""
        if isinstance(error, ConfigError):
            terminal.say(str(error))
            raise typer.Exit(2) from None
        if isinstance(error, KeyboardInterrupt):
            terminal.say(f"Stopped. {going_on} from the last resume point{log}.")
            raise typer.Exit(130) from None
        first = str(error).strip().splitlines()
        terminal.say(f"Failed: {type(error).__name__}{': ' + first[0] if first else ''}{log}.")
        raise typer.Exit(1) from None
