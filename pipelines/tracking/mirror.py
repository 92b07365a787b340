"""MLflow as a mirror of the run folder: one MLflow run for one run or search, across restarts.

Everything that MLflow shows is in the run folder first. The mirror asks MLflow for its content, and
sends the rest of the folder's. So a server that dies costs one warning, and nothing is lost when a
run is killed. Nothing is sent twice: the next mirror of the folder sends only the rest.
"""

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pipelines.config.schema import ConfigError, TrackingConfig
from pipelines.config.text import one_line
from pipelines.storage.run_folder import RunFolder
from pipelines.terminal import Terminal
from pipelines.tracking.contents import LOSSES, TRIALS, read_contents, read_lines, read_trial
from pipelines.tracking.mlflow_store import (
    LoggedRun,
    RefusedError,
    Store,
    load_mlflow,
    locate,
)

# Time between two batches of steps.
FLUSH_S = 5.0
# Time before a server that failed is tried again.
RETRY_S = 60.0
# Steps in one request. MLflow takes at most 1000 metrics, and takes them all or none.
STEPS_AT_ONCE = 40

Status = Literal["FINISHED", "FAILED", "KILLED"]
_logger = logging.getLogger(__name__)


class Mirror:
    """The MLflow run of one run folder.

    Methods are safe to call from several threads, and raise no failure of MLflow.

    Attributes:
        run_id: MLflow's id of the run, None until the server has answered once.
        model_version: the version of the registered adapter, None until it has been uploaded.
        is_complete: whether the last attempt to send reached its end.
    """

    def __init__(
        self, store: Store, folder: Path, name: str, key: str, warn: Callable[[str], None]
    ) -> None:
        self.run_id: str | None = None
        self.model_version: int | None = None
        self.is_complete = False
        self._store, self._folder, self._name, self._key = store, folder, name, key
        self._warn, self._warned = warn, set[str]()
        self._lock = threading.RLock()
        # MLflow's content of the run. It is asked for again after every failure.
        self._run: LoggedRun | None = None
        self._read_bytes = {LOSSES: 0, TRIALS: 0}
        self._flush_at_s = self._retry_at_s = 0.0

    def send(self, status: Status | None = None) -> None:
        """Send everything that MLflow lacks. With a status, end the run there."""
        with self._lock:
            # Contents are sent when a run is opened, and may have grown since.
            self._run = None
            self._try_to_send(status)

    def send_lines(self, *, at_once: bool = False) -> None:
        """Send new steps and trials, unless the last sending or failure is too recent.

        That is `FLUSH_S` seconds for a sending, but for `at_once`, and `RETRY_S` for a failure.
        """
        with self._lock:
            due_s = self._retry_at_s if at_once else max(self._retry_at_s, self._flush_at_s)
            if time.monotonic() >= due_s:
                self._try_to_send(None)

    def _try_to_send(self, status: Status | None) -> None:
        """Send, and turn a failure into one warning and a time to try again."""
        was_healthy = self.run_id is not None and self._retry_at_s == 0
        failure = self._attempt(status)
        if failure is not None and was_healthy:
            # The server may only have closed an idle connection, or the run was deleted there.
            failure = self._attempt(status)
        self.is_complete = failure is None
        self._flush_at_s = time.monotonic() + FLUSH_S
        self._retry_at_s = 0.0
        if failure is not None:
            self._retry_at_s = time.monotonic() + RETRY_S
            consequence = f"the run goes on, and {self._folder} keeps what is to be sent"
            self._warn_once("is out of reach", f"; {consequence} ({failure})")

    def _attempt(self, status: Status | None) -> Exception | None:
        """Send everything in order, and return the reason if something did not arrive."""
        is_fresh = self._run is None
        failure: Exception | None = None
        try:
            if self._run is None:
                self._read_bytes = dict.fromkeys(self._read_bytes, 0)
                self._run = self._store.open_run(self._key, self._name)
                self.run_id = self._run.id
                failure = self._send_contents(self._run)
            self._send_steps(self._run, may_refuse=is_fresh)
            self._send_trials(self._run)
            if status is not None:
                self._run.end(status)
        except Exception as error:
            # The errors of MLflow, database drivers and cloud clients share no base class.
            failure = error
        if failure is not None:
            self._run = None
        return failure

    def _send_contents(self, run: LoggedRun) -> Exception | None:
        """Send everything but the growing files, and return the failure of the artifact store."""
        contents = read_contents(self._folder)
        self._unless_refused("the parameters", partial(run.log_parameters, contents.parameters))
        for name, entry in contents.datasets.items():
            log = partial(run.log_dataset, name, str(entry["digest"]), int(entry["rows"]))
            self._unless_refused(f"data set {name[:40]}", log)
        self._unless_refused("the scores", partial(run.log_scores, contents.scores))
        # An artifact store can be out of reach while the server answers. Then the rest is sent.
        failure: Exception | None = None
        try:
            if contents.adapter is not None:
                self.model_version = run.register(contents.adapter, contents.alias)
        except Exception as error:
            failure = error
        for page in contents.pages:
            try:
                self._unless_refused(page.name, partial(run.log_file, page))
            except Exception as error:
                failure = error
        return failure

    def _send_steps(self, run: LoggedRun, *, may_refuse: bool) -> None:
        """Send new lines of losses.jsonl. With `may_refuse` MLflow may refuse their content."""
        lines, end = read_lines(self._folder / LOSSES, self._read_bytes[LOSSES])
        # A restarted run repeats steps. One that MLflow has is not sent again.
        steps: dict[int, dict[str, Any]] = {}
        for line in lines:
            if "step" in line:
                steps[int(line.pop("step"))] = line
        missing = [(step, steps[step]) for step in sorted(steps.keys() - run.steps)]
        for first in range(0, len(missing), STEPS_AT_ONCE):
            log = partial(run.log_steps, dict(missing[first : first + STEPS_AT_ONCE]))
            if may_refuse:
                self._unless_refused("steps", log)
            else:
                # The run may have been deleted, which MLflow reports as it reports wrong content.
                log()
        self._read_bytes[LOSSES] = end

    def _send_trials(self, run: LoggedRun) -> None:
        """Send new lines of trials.jsonl."""
        lines, end = read_lines(self._folder / TRIALS, self._read_bytes[TRIALS])
        for trial in map(read_trial, lines):
            log = partial(self._store.log_trial, run, f"{self._key}-{trial.name}", trial)
            self._unless_refused(trial.name, log)
        self._read_bytes[TRIALS] = end

    def _unless_refused(self, content: str, log: Callable[[], None]) -> None:
        """Log, or warn that MLflow refuses the content, which then is never sent."""
        try:
            log()
        except RefusedError as error:
            self._warn_once(f"refuses {content}", f"; that is left out ({error})")

    def _warn_once(self, fault: str, more: str) -> None:
        """Warn of a fault of the store, in one line, the first time that it occurs."""
        if fault not in self._warned:
            self._warned.add(fault)
            self._warn(one_line(f"tracking.uri: {self._store.uri} {fault}{more}"))


def open_mirror(
    cfg: TrackingConfig,
    folder: Path,
    name: str,
    key: str,
    warn: Callable[[str], None] = _logger.warning,
) -> Mirror:
    """Start or resume the MLflow run that `key` names, and send the content of `folder` to it.

    A server that does not answer is no error. `warn` is then called once.

    Raises:
        ConfigError: MLflow cannot take `tracking.uri` or `tracking.model_name`.
    """
    assert re.fullmatch(r"[\w.:-]+", key), key
    folder = folder.resolve()
    mirror = Mirror(Store(*check_tracking(cfg, folder), cfg), folder, name, key, warn)
    mirror.send()
    return mirror


@contextmanager
def mirrored_to_mlflow(run: RunFolder, terminal: Terminal) -> Iterator[Mirror]:
    """Update MLflow with a run folder within the scope, and end the run there as it ends here.

    At the end of a finished run the entry `mlflow` is written to the manifest: run id, server,
    registered version, and whether MLflow has everything.
    """
    mirror = open_mirror(run.cfg.tracking, run.path, run.path.name, run.key, terminal.say)
    # Only what reaches the end of the block is finished. Any exception leaves this as it is.
    status: Status = "FAILED"
    try:
        yield mirror
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        mirror.send(status)
        if status == "FINISHED":
            run.update(mlflow=describe(mirror, run, is_complete=mirror.is_complete))


def describe(mirror: Mirror, run: RunFolder, *, is_complete: bool) -> dict[str, Any]:
    """Return the manifest's entry `mlflow`, with values of an earlier process if there are none."""
    earlier = run.manifest().get("mlflow") or {}
    return {
        "run_id": mirror.run_id or earlier.get("run_id"),
        "uri": run.cfg.tracking.uri,
        "model_version": mirror.model_version or earlier.get("model_version"),
        "is_complete": is_complete,
    }


def lacks_records(run: RunFolder) -> bool:
    """Return whether MLflow lacks a part of a finished run, as its server was down at the end."""
    return (run.manifest().get("mlflow") or {}).get("is_complete") is False


def check_tracking(cfg: TrackingConfig, folder: Path) -> tuple[str, str | None]:
    """Return the store's URI and the address of its artifacts, without contacting either.

    Raises:
        ConfigError: as `open_mirror`.
    """
    if not cfg.model_name.strip(" .") or set("/:") & set(cfg.model_name):
        raise ConfigError(
            f"tracking.model_name: found '{cfg.model_name}', allowed: a name without / and :"
        )
    return locate(cfg.uri, folder.resolve())


def preload() -> None:
    """Import MLflow, which takes seconds. Call it in a thread while the command waits for Ray."""
    load_mlflow()
