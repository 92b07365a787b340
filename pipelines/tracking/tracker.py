"""Tracking: one MLflow run for one unlearning run, across restarts.

Every record first goes into `tracking_unsent.jsonl` in the run's folder, is sent from there in order and in batches,
and leaves the file when it has arrived. So a server that dies costs one warning, and a killed run loses no record: what
the file holds is sent when the server answers again, at the end, or when a tracker is opened for the folder again.
"""

import itertools
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pipelines.config.schema import ConfigError, TrackingConfig
from pipelines.tracking.mlflow_store import (
    DIGEST_LENGTH,
    KEY_LENGTH,
    UPLOADS,
    VALUE_LENGTH,
    Record,
    RefusedError,
    Store,
    load_mlflow,
    locate,
    one_line,
)

FLUSH_S = 5.0  # between two batches of step metrics
RETRY_S = 60.0  # before a store that failed is tried again

_logger = logging.getLogger(__name__)


class Tracker:
    """One unlearning run's records. Safe to call from several threads; no failure of MLflow's is raised here.

    `run_id` is MLflow's id of the run, None until the server has answered once.
    """

    def __init__(
        self,
        store: "Store",
        unsent: "_Unsent",
        run: Record,
        warn: Callable[[str], None],
        lock: "threading.RLock | None" = None,
    ) -> None:
        self.run_id: str | None = None
        self._store, self._unsent, self._run, self._warn = store, unsent, run, warn
        self._lock = lock or threading.RLock()
        self._flush_at_s = self._retry_at_s = 0.0
        self._healthy = self._closed = False
        self._warned: set[str] = set()
        self._record("open")

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Log the nested configuration as `train.steps`; what a restart changed becomes a tag `resumed.train.steps`."""
        self._record(
            "parameters",
            values={_key(key): str(value)[:VALUE_LENGTH] for key, value in _flat(parameters)},
        )

    def log_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log one optimizer step's metrics; sent together with others, at most every `FLUSH_S` seconds."""
        self._record(
            "metrics", step=step, values={_key(key): float(value) for key, value in metrics.items()}
        )

    def log_scores(self, prefix: str, scores: Mapping[str, float | None]) -> None:
        """Log a model's scores as metrics `prefix.name`; a score that is None is left out."""
        values = {
            _key(f"{prefix}.{name}"): float(score)
            for name, score in scores.items()
            if score is not None
        }
        self._record("scores", step=0, values=values)

    def log_dataset(self, name: str, digest: str, rows: int) -> None:
        """Log a set's name, digest (cut to MLflow's 36 characters) and number of rows; nothing of its content."""
        self._record("dataset", set=name, digest=digest[:DIGEST_LENGTH], rows=rows)

    def child(self, run_name: str) -> "Tracker":
        """A run inside this one, in MLflow's sense: a new one, or the one of that name. Close it before this one."""
        key = self._run["run_key"]
        run = {"run_key": f"{key}-{run_name}", "run_name": run_name, "parent_key": key}
        return Tracker(self._store, self._unsent, run, self._warn, self._lock)

    def log_adapter(
        self, folder: Path, name: str | None = None, alias: str | None = None
    ) -> int | None:
        """Upload a PEFT folder and register it, as `tracking.model_name` without a name; the same weights only once.
        An alias then points at that version, and no longer at another.

        Returns:
            The registered version; None when it waits for the server.
        """
        path = str(folder.resolve())
        with self._lock:
            self._store.versions.pop(path, None)
            self._record("adapter", path=path, model=name, alias=alias)
            return self._store.versions.get(path)

    def log_artifact(self, path: Path) -> None:
        """Upload a file or a folder to the top of the run's artifacts."""
        self._record("artifact", path=str(path.resolve()))

    def close(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED") -> None:
        """Send what is left and end the run. Only the first call counts."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._record("close", status=status)

    def _record(self, kind: str, **content: Any) -> None:
        with self._lock:
            self._unsent.append(
                {"kind": kind, **self._run, "time_ms": int(time.time() * 1000), **content}
            )
            due_s = (
                max(self._retry_at_s, self._flush_at_s) if kind == "metrics" else self._retry_at_s
            )
            if kind in ("adapter", "close") or time.monotonic() >= due_s:
                self._send()

    def _send(self) -> None:
        failure = self._attempt()
        if (
            failure is not None and self._healthy
        ):  # perhaps only a kept-alive connection that the server had closed
            failure = self._attempt()
        self._healthy = failure is None
        self._flush_at_s = time.monotonic() + FLUSH_S
        self._retry_at_s = 0.0 if failure is None else time.monotonic() + RETRY_S
        if failure is not None:
            self._warn_once(
                "out of reach",
                f"; the run goes on, its records wait in {self._unsent.path} ({failure})",
            )

    def _attempt(self) -> Exception | None:
        """Send the file's records in order. What does not arrive stays in the file; the reason is returned."""
        records, kept = self._unsent.read(), list[Record]()
        failure, blocked = None, False
        for batch in _batches(records):
            if blocked:
                kept += batch
                continue
            try:
                run_id = self._store.write(batch)
                if batch[0]["run_key"] == self._run["run_key"]:
                    self.run_id = run_id
            except RefusedError as error:
                self._warn_once(
                    f"refuses a record of kind {batch[0]['kind']}", f"; it is left out ({error})"
                )
            except (
                Exception
            ) as error:  # MLflow, database drivers and cloud clients share no base class
                failure = error
                kept += batch
                blocked = (
                    batch[0]["kind"] not in UPLOADS
                )  # an artifact store out of reach holds nothing else back
        if len(kept) < len(records):
            self._unsent.keep(kept)
        return failure

    def _warn_once(self, what: str, more: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            self._warn(one_line(f"tracking.uri: {self._store.uri} {what}{more}"))


class _Unsent:
    """The file of records that have not arrived, oldest first. One process at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self.keep(self.read())

    def append(self, record: Record) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def read(self) -> list[Record]:
        """The records, without the half line at the end that a killed run may have left."""
        return [
            json.loads(line)
            for line in self.path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
        ]

    def keep(self, records: list[Record]) -> None:
        """Leave these records in the file; no file when there are none."""
        rest = self.path.with_suffix(".part")
        rest.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        rest.replace(self.path)
        if not records:
            self.path.unlink()


def open_tracker(
    cfg: TrackingConfig,
    folder: Path,
    run_name: str,
    run_key: str,
    warn: Callable[[str], None] = _logger.warning,
) -> Tracker:
    """Start the MLflow run that `run_key` names, or resume it, and send what an earlier process left in `folder`.

    A server that does not answer is no error: the records wait in the folder, and `warn` is told once.

    Raises:
        ConfigError: `tracking.uri` or `tracking.model_name` is nothing that MLflow can take.
    """
    assert re.fullmatch(r"[\w.:-]+", run_key), run_key
    folder = folder.resolve()
    store = Store(*check_tracking(cfg, folder), cfg)
    return Tracker(
        store,
        _Unsent(folder / "tracking_unsent.jsonl"),
        {"run_key": run_key, "run_name": run_name},
        warn,
    )


def check_tracking(cfg: TrackingConfig, folder: Path) -> tuple[str, str | None]:
    """The store's uri and where artifacts go, without contacting anything.

    Raises:
        ConfigError: as `open_tracker`.
    """
    if not cfg.model_name.strip(" .") or set("/:") & set(cfg.model_name):
        raise ConfigError(
            f"tracking.model_name: found '{cfg.model_name}', allowed: a name without / and :"
        )
    return locate(cfg.uri, folder.resolve())


def preload() -> None:
    """Import MLflow, which takes seconds; from a thread, while something else is waited for."""
    load_mlflow()


def _batches(records: list[Record]) -> Iterator[list[Record]]:
    """Neighbouring step metrics of one run together, every other record alone."""
    for _, batch in itertools.groupby(
        records, lambda r: r["run_key"] if r["kind"] == "metrics" else id(r)
    ):
        yield list(batch)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _key(name: str) -> str:
    """The name in characters that MLflow takes."""
    return re.sub(r"[^\w\-. /]", "_", name)[:KEY_LENGTH]
