"""Tracking with MLflow, which nothing else here knows: one MLflow run for one unlearning run, across restarts.

Every record first goes into `tracking_unsent.jsonl` in the run's folder, is sent from there in order and in batches,
and leaves the file when it has arrived. So a server that dies costs one warning, and a killed run loses no record: what
the file holds is sent when the server answers again, at the end, or when a tracker is opened for the folder again.
"""

import functools
import hashlib
import itertools
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pipelines.config import ConfigError, TrackingConfig

FLUSH_S = 5.0  # between two batches of step metrics
RETRY_S = 60.0  # before a store that failed is tried again
REQUEST_TIMEOUT_S = 5
UPLOAD_TIMEOUT_S = 120
KEY_LENGTH, VALUE_LENGTH, DIGEST_LENGTH = 250, 6000, 36  # limits in mlflow/utils/validation.py, 3.17
RUN_KEY_TAG = "ray_unlearn.run_key"
DIGEST_TAG = "ray_unlearn.adapter_digest"
UPLOADS = ("adapter", "artifact")

Record = dict[str, Any]
_logger = logging.getLogger(__name__)


class _RefusedError(Exception):
    """The server answers, and will never take this record."""


class Tracker:
    """One unlearning run's records. Safe to call from several threads; no failure of MLflow's is raised here.

    `run_id` is MLflow's id of the run, None until the server has answered once.
    """

    def __init__(self, store: "_Store", unsent: "_Unsent", run: Record, warn: Callable[[str], None]) -> None:
        self.run_id: str | None = None
        self._store, self._unsent, self._run, self._warn = store, unsent, run, warn
        self._lock = threading.RLock()
        self._flush_at_s = self._retry_at_s = 0.0
        self._healthy = self._closed = False
        self._warned: set[str] = set()
        self._record("open")

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Log the nested configuration as `train.steps`; what a restart changed becomes a tag `resumed.train.steps`."""
        self._record("parameters", values={_key(key): str(value)[:VALUE_LENGTH] for key, value in _flat(parameters)})

    def log_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log one optimizer step's metrics; sent together with others, at most every `FLUSH_S` seconds."""
        self._record("metrics", step=step, values={_key(key): float(value) for key, value in metrics.items()})

    def log_scores(self, prefix: str, scores: Mapping[str, float | None]) -> None:
        """Log a model's scores as metrics `prefix.name`; a score that is None is left out."""
        values = {_key(f"{prefix}.{name}"): float(score) for name, score in scores.items() if score is not None}
        self._record("scores", step=0, values=values)

    def log_dataset(self, name: str, digest: str, rows: int) -> None:
        """Log a set's name, digest (cut to MLflow's 36 characters) and number of rows; nothing of its content."""
        self._record("dataset", set=name, digest=digest[:DIGEST_LENGTH], rows=rows)

    def log_adapter(self, folder: Path, name: str | None = None) -> int | None:
        """Upload a PEFT folder and register it, as `tracking.model_name` without a name; the same weights only once.

        Returns:
            The registered version; None when it waits for the server.
        """
        path = str(folder.resolve())
        with self._lock:
            self._store.versions.pop(path, None)
            self._record("adapter", path=path, model=name)
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
            self._unsent.append({"kind": kind, **self._run, "time_ms": int(time.time() * 1000), **content})
            due_s = max(self._retry_at_s, self._flush_at_s) if kind == "metrics" else self._retry_at_s
            if kind in ("adapter", "close") or time.monotonic() >= due_s:
                self._send()

    def _send(self) -> None:
        failure = self._attempt()
        if failure is not None and self._healthy:  # perhaps only a kept-alive connection that the server had closed
            failure = self._attempt()
        self._healthy = failure is None
        self._flush_at_s = time.monotonic() + FLUSH_S
        self._retry_at_s = 0.0 if failure is None else time.monotonic() + RETRY_S
        if failure is not None:
            self._warn_once("out of reach", f"; the run goes on, its records wait in {self._unsent.path} ({failure})")

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
            except _RefusedError as error:
                self._warn_once(f"refuses a record of kind {batch[0]['kind']}", f"; it is left out ({error})")
            except Exception as error:  # MLflow, database drivers and cloud clients share no base class
                failure = error
                kept += batch
                blocked = batch[0]["kind"] not in UPLOADS  # an artifact store out of reach holds nothing else back
        if len(kept) < len(records):
            self._unsent.keep(kept)
        return failure

    def _warn_once(self, what: str, more: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            self._warn(_one_line(f"tracking.uri: {self._store.uri} {what}{more}"))


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
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()]

    def keep(self, records: list[Record]) -> None:
        """Leave these records in the file; no file when there are none."""
        rest = self.path.with_suffix(".part")
        rest.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        rest.replace(self.path)
        if not records:
            self.path.unlink()


class _Store:
    """One MLflow store: finds runs, writes records. Raises whatever MLflow, a driver or a cloud's client raises."""

    def __init__(self, uri: str, artifacts: str | None, cfg: TrackingConfig) -> None:
        self.uri, self._artifacts, self._cfg = uri, artifacts, cfg
        self.versions: dict[str, int] = {}  # registered versions by adapter folder
        self._run_ids: dict[str, str] = {}

    @functools.cached_property
    def _client(self) -> Any:
        return _mlflow().MlflowClient(self.uri, registry_uri=self.uri)

    def write(self, records: list[Record]) -> str:
        """Write records of one kind and run, and return the run's id.

        Raises:
            _RefusedError: the server answers that this content is not allowed, or a file to upload is gone.
        """
        first = records[0]
        kind, key = first["kind"], first["run_key"]
        if kind in UPLOADS and not Path(first["path"]).exists():
            raise _RefusedError(f"{first['path']} is gone")
        known_id = self._run_ids.pop(key, None)  # forgotten when this fails, in case the run is gone
        with _limits(REQUEST_TIMEOUT_S):
            run = None if known_id and kind == "metrics" else self._find_run(first)
        run_id = str(run.info.run_id if run else known_id)
        try:
            with _limits(UPLOAD_TIMEOUT_S if kind in UPLOADS else REQUEST_TIMEOUT_S):
                self._write(run_id, run, records)
        except Exception as error:
            if run is not None and getattr(error, "error_code", None) == "INVALID_PARAMETER_VALUE":
                raise _RefusedError(error) from error
            raise
        self._run_ids[key] = run_id
        return run_id

    def _find_run(self, record: Record) -> Any:
        client, name = self._client, self._cfg.experiment
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            _unless_there(client.create_experiment, name, self._artifacts)
            experiment = client.get_experiment_by_name(name)
        found = client.search_runs([experiment.experiment_id], f"tags.`{RUN_KEY_TAG}` = '{record['run_key']}'")
        if found:
            return found[-1]  # the oldest
        tags = {RUN_KEY_TAG: record["run_key"]}
        return client.create_run(experiment.experiment_id, record["time_ms"], tags, record["run_name"])

    def _write(self, run_id: str, run: Any, records: list[Record]) -> None:
        client, entities, first = self._client, _mlflow().entities, records[0]
        match first["kind"]:
            case "open":
                client.update_run(run_id, status="RUNNING")
            case "parameters":  # MLflow never changes one
                values, known = first["values"], run.data.params
                changed = [key for key in values if known.get(key, values[key]) != values[key]]
                client.log_batch(
                    run_id,
                    params=[entities.Param(key, values[key]) for key in values if key not in known],
                    tags=[entities.RunTag(f"resumed.{key}"[:KEY_LENGTH], values[key]) for key in changed],
                )
            case "metrics" | "scores":
                points = ((r["step"], r["time_ms"], *item) for r in records for item in r["values"].items())
                metrics = [entities.Metric(key, value, time_ms, step) for step, time_ms, key, value in points]
                client.log_batch(run_id, metrics)
            case "dataset":
                profile, context = {"num_rows": first["rows"]}, entities.InputTag("mlflow.data.context", first["set"])
                dataset = entities.Dataset(
                    first["set"], first["digest"], "ray_unlearn", "{}", profile=json.dumps(profile)
                )
                client.log_inputs(run_id, [entities.DatasetInput(dataset, [context])])
            case "adapter":
                model = first["model"] or self._cfg.model_name
                self.versions[first["path"]] = self._register(run, Path(first["path"]), model)
            case "artifact":
                client.log_artifact(run_id, first["path"])
            case _:
                client.set_terminated(run_id, first["status"], first["time_ms"])

    def _register(self, run: Any, folder: Path, model: str) -> int:
        client, run_id, digest = self._client, run.info.run_id, _weights_digest(folder)
        versions = client.search_model_versions(f"run_id = '{run_id}'")
        for version in versions:
            if version.name == model and version.tags.get(DIGEST_TAG) == digest:
                return int(version.version)
        place = "adapter" if not versions else f"adapter-{digest[:12]}"  # a registered version's files never change
        client.log_artifacts(run_id, str(folder), place)
        _unless_there(client.create_registered_model, model)
        source, tags = f"{run.info.artifact_uri}/{place}", {DIGEST_TAG: digest}
        return int(client.create_model_version(model, source, run_id, tags=tags).version)


def open_tracker(
    cfg: TrackingConfig, folder: Path, run_name: str, run_key: str, warn: Callable[[str], None] = _logger.warning
) -> Tracker:
    """Start the MLflow run that `run_key` names, or resume it, and send what an earlier process left in `folder`.

    A server that does not answer is no error: the records wait in the folder, and `warn` is told once.

    Raises:
        ConfigError: `tracking.uri` or `tracking.model_name` is nothing that MLflow can take.
    """
    assert re.fullmatch(r"[\w.:-]+", run_key), run_key
    folder = folder.resolve()
    store = _Store(*check_tracking(cfg, folder), cfg)
    return Tracker(store, _Unsent(folder / "tracking_unsent.jsonl"), {"run_key": run_key, "run_name": run_name}, warn)


def check_tracking(cfg: TrackingConfig, folder: Path) -> tuple[str, str | None]:
    """The store's uri and where artifacts go, without contacting anything.

    Raises:
        ConfigError: as `open_tracker`.
    """
    if not cfg.model_name.strip(" .") or set("/:") & set(cfg.model_name):
        raise ConfigError(f"tracking.model_name: found '{cfg.model_name}', allowed: a name without / and :")
    return _locate(cfg.uri, folder.resolve())


def _locate(uri: str | None, folder: Path) -> tuple[str, str | None]:
    """The store's uri, and where artifacts go (None: the server decides)."""
    if uri is None:
        database = folder / "mlflow.db"
    elif re.fullmatch(r"https?://([^\s/@]+@)?(\[[0-9a-fA-F:.]+\]|[\w.-]+)(:\d{1,5})?(/\S*)?", uri):
        return uri, None
    elif re.fullmatch(r"(postgresql|mysql|mssql)(\+\w+)?://\S+", uri):
        return uri, str(folder / "mlartifacts")
    elif re.fullmatch(r"sqlite:///[^?]+", uri):
        database = Path(uri.removeprefix("sqlite:///")).absolute()
    elif re.fullmatch(r"(file://)?[^:]+", uri):  # MLflow takes no new runs in plain files: a sqlite file there
        database = Path(uri.removeprefix("file://")).absolute() / "mlflow.db"
    else:
        allowed = "http(s)://host:port, sqlite:///file, a folder, postgresql://, mysql://, mssql://"
        raise ConfigError(_one_line(f"tracking.uri: found '{uri}', allowed: {allowed}"))
    if set("%?") & set(str(database)):  # MLflow decodes them in some places: files would end up elsewhere
        key = "tracking.uri" if uri else "output_dir"
        raise ConfigError(f"{key}: found '{database}', allowed: a path without % and ?")
    return f"sqlite:///{database}", str(database.parent / "mlartifacts")


def preload() -> None:
    """Import MLflow, which takes seconds; from a thread, while something else is waited for."""
    _mlflow()


@functools.cache
def _mlflow() -> Any:
    """MLflow, imported late because that takes seconds; it sends no usage data and prints nothing."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow
    import mlflow.store.db.utils

    mlflow.store.db.utils.MAX_RETRY_COUNT = 1  # ten attempts at a database that is down take 100 s
    for name in ("mlflow", "alembic"):  # to whatever logging the application has, not to stderr
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [logging.NullHandler()], True
    return mlflow


@contextmanager
def _limits(timeout_s: int) -> Generator[None]:
    """MLflow's HTTP limits for a while, in the environment, where it reads them; those that the user has set stay."""
    limits = {"MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout_s), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    ours = {name: value for name, value in limits.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def _unless_there(create: Callable[..., Any], *arguments: Any) -> None:
    """Create what another run may have created a moment ago."""
    try:
        create(*arguments)
    except _mlflow().MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _batches(records: list[Record]) -> Iterator[list[Record]]:
    """Neighbouring step metrics of one run together, every other record alone."""
    for _, batch in itertools.groupby(records, lambda r: r["run_key"] if r["kind"] == "metrics" else id(r)):
        yield list(batch)


def _weights_digest(folder: Path) -> str:
    """SHA-256 over names and contents; not of JSON and Markdown, which differ between two saves of one adapter."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix not in {".json", ".md"}):
        with path.open("rb") as file:
            digest.update(path.relative_to(folder).as_posix().encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _key(name: str) -> str:
    """The name in characters that MLflow takes."""
    return re.sub(r"[^\w\-. /]", "_", name)[:KEY_LENGTH]


def _one_line(text: str) -> str:
    """The text without line breaks and without the password that a uri may hold."""
    return re.sub(r"//[^/@\s]*@", "//", " ".join(text.split()))[:600]
