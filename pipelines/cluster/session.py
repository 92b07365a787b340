"""A command's Ray: started or joined, quiet, and shut down again."""

import os
import secrets
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray._private import worker
from ray._private.services import canonicalize_bootstrap_address
from ray.data import DataContext

from pipelines.cluster.resources import worker_environment
from pipelines.cluster.spill import private_spilling
from pipelines.config.schema import ConfigError, TrainConfig
from pipelines.terminal import Terminal

# The processes of Ray on the driver's machine without which the driver's own part aborts it.
VITAL = {"raylet", "gcs_server"}
LOOK_S = 1.0
# By these a user gives Ray's token, or does without.
TOKEN = "RAY_AUTH_TOKEN"
CHOSEN = (TOKEN, "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE")


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
    with ExitStack() as stack:
        stack.enter_context(terminal.chatter_to(log_path))
        stack.enter_context(sigterm_as_interrupt())
        if not ray.is_initialized():
            stack.enter_context(private_spilling())
            threading.Thread(target=preload, daemon=True).start()
            stack.callback(ray.shutdown)
            _start_ray(train)
            stack.enter_context(_watched(terminal))
        context = DataContext.get_current()
        context.enable_progress_bars = False
        # A run must read the same rows in the same order, however its tasks are scheduled.
        context.execution_options.preserve_order = True
        yield


def _start_ray(train: TrainConfig) -> None:
    """Start Ray on this machine, or join the cluster that the environment names."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray logs the message of a failed task whose result nobody fetches, and an error about a row
    # quotes its text.
    os.environ["RAY_IGNORE_UNHANDLED_ERRORS"] = "1"
    # Ray reuses an idle process, with its imports, for tasks of the same environment. So all
    # workers get one environment, and up to 8 idle processes stay.
    os.environ.setdefault("RAY_num_workers_soft_limit", "8")
    # Its watcher saves work from a node that is about to go: a lone node has no other.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    _give_token()
    try:
        ray.init(include_dashboard=False, runtime_env={"env_vars": worker_environment(train)})
    except SystemExit:
        # Ray sets a handler of its own, which leaves by this without a word.
        raise KeyboardInterrupt from None
    signal.signal(signal.SIGTERM, _interrupt)


def _give_token() -> None:
    """Give a Ray that is started here a token of its own.

    Ray listens on all interfaces, and lets in who knows the token. Its own choice is one for all
    its starts, in a file that everybody can read. A process keeps its token, as Ray's native part
    reads it once.
    """
    is_chosen = any(name in os.environ for name in CHOSEN)
    address: Any = None  # as `ray.init` gets it: what the environment or `ray start` says
    if not is_chosen and canonicalize_bootstrap_address(address) is None:
        os.environ[TOKEN] = secrets.token_hex(32)


@contextmanager
def _watched(terminal: Terminal) -> Iterator[None]:
    """End the command with a word if Ray's own processes on this machine die within.

    Ray's native part would abort the driver some seconds later, and nothing could be said then.
    """
    over = threading.Event()

    def watch() -> None:
        while not over.wait(LOOK_S):
            node: Any = worker._global_node
            dead = VITAL & {name for name, _ in node.dead_processes()} if node else None
            if dead and not over.is_set():
                name = ", ".join(sorted(dead))
                terminal.last_words(
                    f"Failed: Ray's {name} on this machine ended, as for want of memory; "
                    f"the log is {terminal.log_path}."
                )
                os._exit(1)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


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
    # Ray's native handler would abort the process (exit code 134) after the command's last words.
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    # A shell without job control lets background processes ignore Ctrl-C, but not this.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        raise KeyboardInterrupt
    # Whoever handles Ctrl-C at the time handles it: Ray Train has a handler of its own.
    signal.raise_signal(signal.SIGINT)
