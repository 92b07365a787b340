"""A command's Ray: started or joined, quiet, and shut down again."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray.data import DataContext

from pipelines.cluster.resources import worker_environment
from pipelines.config.schema import TrainConfig
from pipelines.terminal import Terminal


@contextmanager
def session(
    train: TrainConfig,
    log_path: Path,
    terminal: Terminal,
    preload: Callable[[], object] = lambda: None,
) -> Iterator[None]:
    """Ray, started here or joined where it runs already, with its chatter in the run's log.

    `preload` runs in a thread while Ray starts: slow imports of the driver.
    """
    with terminal.chatter_to(log_path):
        started_here = not ray.is_initialized()
        if started_here:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            # Ray would log the failures of tasks whose results nobody fetches, and what a row's error says is text.
            os.environ["RAY_IGNORE_UNHANDLED_ERRORS"] = "1"
            threading.Thread(target=preload, daemon=True).start()
            # One environment for all workers, and idle ones kept: Ray reuses a process, with what it has imported.
            os.environ.setdefault("RAY_num_workers_soft_limit", "8")
            os.environ.setdefault(
                "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0"
            )  # a Ray of one node is lost as a whole
            ray.init(include_dashboard=False, runtime_env={"env_vars": worker_environment(train)})
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        try:
            yield
        finally:
            if started_here:
                ray.shutdown()
