"""A command's Ray: started or joined, quiet, and shut down again."""

import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType

import ray
from ray.data import DataContext

from pipelines.cluster.resources import worker_environment
from pipelines.cluster.spill import private_spilling
from pipelines.config.schema import ConfigError, TrainConfig
from pipelines.terminal import Terminal


@contextmanager
def session(
    train: TrainConfig,
    log_path: Path,
    terminal: Terminal,
    preload: Callable[[], object] = lambda: None,
) -> Iterator[None]:
    """Start Ray, or join it where it runs already, and write its output to the run's log.

    SIGTERM stops what runs within as Ctrl-C does. `preload` runs in a thread while Ray starts, for
    the driver's slow imports.
    """
    started_here = not ray.is_initialized()
    with ExitStack() as stack:
        stack.enter_context(terminal.chatter_to(log_path))
        if started_here:
            stack.enter_context(private_spilling())
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            # Ray logs the message of a failed task whose result nobody fetches, and an error about
            # a row quotes its text.
            os.environ["RAY_IGNORE_UNHANDLED_ERRORS"] = "1"
            threading.Thread(target=preload, daemon=True).start()
            # Ray reuses an idle process, with its imports, for tasks of the same environment. So
            # all workers get one environment, and up to 8 idle processes stay.
            os.environ.setdefault("RAY_num_workers_soft_limit", "8")
            # Its watcher saves work from a node that is about to go: a lone node has no other.
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
            ray.init(include_dashboard=False, runtime_env={"env_vars": worker_environment(train)})
            hide_token()
        context = DataContext.get_current()
        context.enable_progress_bars = False
        # A run must read the same rows in the same order, however its tasks are scheduled.
        context.execution_options.preserve_order = True
        try:
            with sigterm_as_interrupt():
                yield
        finally:
            if started_here:
                ray.shutdown()


def hide_token() -> None:
    """Let only this user read the token file that Ray makes at its first start.

    Ray listens on all interfaces, and writes what keeps others out for everybody to read.
    """
    with suppress(OSError):
        (Path.home() / ".ray" / "auth_token").chmod(0o600)


@contextmanager
def temporary_log() -> Iterator[Path]:
    """Yield the log of a command that has no run folder. It is kept where the command fails."""
    handle, name = tempfile.mkstemp(prefix="ray-unlearn-", suffix=".log")
    os.close(handle)
    try:
        yield Path(name)
    except ConfigError:
        # The message says all that there is to know, and names no log.
        Path(name).unlink()
        raise
    Path(name).unlink()


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Treat SIGTERM, by which schedulers stop a process, as Ctrl-C."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        # A shell without job control lets background processes ignore Ctrl-C, but not this.
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            raise KeyboardInterrupt
        # Whoever handles Ctrl-C at the time handles it: Ray Train has a handler of its own.
        signal.raise_signal(signal.SIGINT)

    # Ray's native handler would abort the process (exit code 134) after the command's last words.
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
