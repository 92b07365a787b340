"""MLflow as a mirror of the run folder: one MLflow run for one unlearning run or search, across restarts.

Everything that MLflow shows lies in the run folder first. The mirror asks MLflow what it has, and sends what the folder
holds beyond that. So a server that dies costs one warning and nothing else, nothing is lost when a run is killed, and
nothing is sent twice: whoever opens a mirror of the folder again sends the rest.
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
from pipelines.storage.filesystem import one_line
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

FLUSH_S = 5.0  # between two batches of steps
RETRY_S = 60.0  # before a server that failed is tried again
STEPS_AT_ONCE = 40  # in one request: MLflow takes 1000 metrics, and takes them all or none

Status = Literal["FINISHED", "FAILED", "KILLED"]
_logger = logging.getLogger(__name__)


class Mirror:
    """The MLflow run of one run folder. Safe to call from several threads; raises no failure of MLflow's.

    Attributes:
        run_id: MLflow's id of the run, None until the server has answered once.
        model_version: the registered adapter's; None until it has been uploaded.
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
        self._run: LoggedRun | None = None  # what MLflow has; asked again after every failure
        self._read_bytes = {LOSSES: 0, TRIALS: 0}
        self._flush_at_s = self._retry_at_s = 0.0

    def send(self, status: Status | None = None) -> None:
        """Send all that MLflow lacks, now, and end the run there with a status."""
        with self._lock:
            self._run = None
            self._try_to_send(status)

    def send_lines(self, *, at_once: bool = False) -> None:
        """Send new steps and trials, at most every `FLUSH_S` seconds (`at_once`: now), while the server answers."""
        with self._lock:
            due_s = self._retry_at_s if at_once else max(self._retry_at_s, self._flush_at_s)
            if time.monotonic() >= due_s:
                self._try_to_send(None)

    def _try_to_send(self, status: Status | None) -> None:
        was_healthy = self.run_id is not None and self._retry_at_s == 0
        failure = self._attempt(status)
        if failure is not None and was_healthy:
            # Perhaps the server had only closed a connection that was kept alive, or the run was deleted there.
            failure = self._attempt(status)
        self.is_complete = failure is None
        self._flush_at_s = time.monotonic() + FLUSH_S
        self._retry_at_s = 0.0
        if failure is not None:
            self._retry_at_s = time.monotonic() + RETRY_S
            consequence = f"the run goes on, and {self._folder} keeps what is to be sent"
            self._warn_once("is out of reach", f"; {consequence} ({failure})")

    def _attempt(self, status: Status | None) -> Exception | None:
        """Send in order; return why something did not arrive."""
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
        except Exception as error:  # MLflow, database drivers and cloud clients share no base class
            failure = error
        if failure is not None:
            self._run = None
        return failure

    def _send_contents(self, run: LoggedRun) -> Exception | None:
        contents = read_contents(self._folder)
        self._unless_refused("the parameters", partial(run.log_parameters, contents.parameters))
        for name, entry in contents.datasets.items():
            log = partial(run.log_dataset, name, str(entry["digest"]), int(entry["rows"]))
            self._unless_refused(f"data set {name[:40]}", log)
        self._unless_refused("the scores", partial(run.log_scores, contents.scores))
        # An artifact store can be out of reach while the server answers: it holds nothing else back.
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
        lines, end = read_lines(self._folder / LOSSES, self._read_bytes[LOSSES])
        # A restarted run repeats steps: one that MLflow has is not sent again.
        steps = {int(line.pop("step")): line for line in lines if "step" in line}
        missing = [(step, steps[step]) for step in sorted(steps.keys() - run.steps)]
        for first in range(0, len(missing), STEPS_AT_ONCE):
            log = partial(run.log_steps, dict(missing[first : first + STEPS_AT_ONCE]))
            if may_refuse:
                self._unless_refused("steps", log)
            else:  # the run may be gone, which MLflow reports as it reports wrong content
                log()
        self._read_bytes[LOSSES] = end

    def _send_trials(self, run: LoggedRun) -> None:
        lines, end = read_lines(self._folder / TRIALS, self._read_bytes[TRIALS])
        for trial in map(read_trial, lines):
            log = partial(self._store.log_trial, run, f"{self._key}-{trial.name}", trial)
            self._unless_refused(trial.name, log)
        self._read_bytes[TRIALS] = end

    def _unless_refused(self, what: str, log: Callable[[], None]) -> None:
        try:
            log()
        except RefusedError as error:
            self._warn_once(f"refuses {what}", f"; that is left out ({error})")

    def _warn_once(self, what: str, more: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            self._warn(one_line(f"tracking.uri: {self._store.uri} {what}{more}"))


def open_mirror(
    cfg: TrackingConfig,
    folder: Path,
    name: str,
    key: str,
    warn: Callable[[str], None] = _logger.warning,
) -> Mirror:
    """Start the MLflow run that `key` names, or resume it, and send what an earlier process left in `folder`.

    A server that does not answer is no error: `warn` is called once.

    Raises:
        ConfigError: `tracking.uri` or `tracking.model_name` is nothing that MLflow can take.
    """
    assert re.fullmatch(r"[\w.:-]+", key), key
    folder = folder.resolve()
    mirror = Mirror(Store(*check_tracking(cfg, folder), cfg), folder, name, key, warn)
    mirror.send()
    return mirror


@contextmanager
def mirrored_to_mlflow(run: RunFolder, terminal: Terminal) -> Iterator[Mirror]:
    """Keep MLflow up to date with a run folder, and end the run there as it ends here.

    The manifest then holds `mlflow`: run id, server and registered version, and whether MLflow has everything.
    """
    mirror = open_mirror(run.cfg.tracking, run.path, run.path.name, run.key, terminal.say)
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
    """Return the manifest's entry `mlflow`: what the mirror knows, or else an earlier process knew."""
    known = run.manifest().get("mlflow", {})
    return {
        "run_id": mirror.run_id or known.get("run_id"),
        "uri": run.cfg.tracking.uri,
        "model_version": mirror.model_version or known.get("model_version"),
        "is_complete": is_complete,
    }


def lacks_records(run: RunFolder) -> bool:
    """Whether MLflow did not get everything of a finished run: its server was down at the end, for example."""
    return run.manifest().get("mlflow", {}).get("is_complete") is False


def check_tracking(cfg: TrackingConfig, folder: Path) -> tuple[str, str | None]:
    """Return the store's uri and where artifacts go, without contacting anything.

    Raises:
        ConfigError: as `open_mirror`.
    """
    if not cfg.model_name.strip(" .") or set("/:") & set(cfg.model_name):
        raise ConfigError(
            f"tracking.model_name: found '{cfg.model_name}', allowed: a name without / and :"
        )
    return locate(cfg.uri, folder.resolve())


def preload() -> None:
    """Import MLflow, which takes seconds; from a thread, while something else is waited for."""
    load_mlflow()
