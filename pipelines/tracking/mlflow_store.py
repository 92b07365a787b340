"""One MLflow store: where it is, what a run there has, how a record gets in. Nothing else here knows MLflow."""

import functools
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.config.schema import ConfigError, TrackingConfig
from pipelines.storage.filesystem import one_line
from pipelines.tracking.contents import Trial

REQUEST_TIMEOUT_S = 5
UPLOAD_TIMEOUT_S = 120
# The limits of mlflow/utils/validation.py, 3.17.
KEY_LENGTH = 250
VALUE_LENGTH = 6000
DIGEST_LENGTH = 36
RUN_KEY_TAG = "ray_unlearn.run_key"
PARENT_TAG = "mlflow.parentRunId"  # mlflow/utils/mlflow_tags.py
DIGEST_TAG = "ray_unlearn.adapter_digest"


class RefusedError(Exception):
    """The server answers, and will never take this record."""


class LoggedRun:
    """A run in MLflow: what it has, and how it gets what it lacks. Every method sends only that.

    Raises whatever MLflow, a database driver or a cloud's client raises.
    """

    def __init__(self, client: Any, run: Any, model_name: str) -> None:
        self.id: str = run.info.run_id
        self.experiment_id: str = run.info.experiment_id
        self._client, self._run, self._model_name = client, run, model_name
        self.steps: set[int] = set()

    def log_parameters(self, parameters: Mapping[str, str]) -> None:
        """Log parameters. MLflow never changes one: a new value becomes the tag `resumed.train.steps`."""
        entities = load_mlflow().entities
        known, new, tags = self._run.data.params, [], []
        for key, value in _valid(parameters).items():
            value = value[:VALUE_LENGTH]
            if key not in known:
                new.append(entities.Param(key, value))
            elif known[key] != value:
                tags.append(entities.RunTag(f"resumed.{key}"[:KEY_LENGTH], value))
        with _request():
            self._client.log_batch(self.id, params=new, tags=tags)

    def log_steps(self, steps: Mapping[int, Mapping[str, float]]) -> None:
        """Log the metrics of optimizer steps, all of them or none."""
        now_ms = _now_ms()
        metrics = [
            load_mlflow().entities.Metric(key, float(value), now_ms, step)
            for step, values in steps.items()
            for key, value in _valid(values).items()
        ]
        self.steps |= steps.keys()  # one that is refused is not tried again
        with _request():
            self._client.log_batch(self.id, metrics)

    def log_scores(self, scores: Mapping[str, float]) -> None:
        """Log metrics without steps."""
        known, now_ms = self._run.data.metrics, _now_ms()
        metrics = [
            load_mlflow().entities.Metric(key, value, now_ms, 0)
            for key, value in _valid(scores).items()
            if known.get(key) != value
        ]
        with _request():
            self._client.log_batch(self.id, metrics)

    def log_dataset(self, name: str, digest: str, rows: int) -> None:
        """Log a set's name, digest (cut to MLflow's 36 characters) and number of rows; nothing of its content."""
        digest = digest[:DIGEST_LENGTH]
        for entry in self._run.inputs.dataset_inputs:
            if (entry.dataset.name, entry.dataset.digest) == (name, digest):
                return
        entities = load_mlflow().entities
        profile = json.dumps({"num_rows": rows})
        dataset = entities.Dataset(name, digest, "ray_unlearn", "{}", profile=profile)
        context = entities.InputTag("mlflow.data.context", name)
        with _request():
            self._client.log_inputs(self.id, [entities.DatasetInput(dataset, [context])])

    def register(self, folder: Path, alias: str | None) -> int:
        """Upload a PEFT folder and register it as `tracking.model_name`; equal weights are registered once.

        `alias` moves to that version, which is returned.
        """
        client, model = self._client, self._model_name
        with _request(UPLOAD_TIMEOUT_S):
            digest = _weights_digest(folder)
            registered = client.search_model_versions(f"run_id = '{self.id}'")
            versions = [
                version
                for version in registered
                if version.name == model and version.tags.get(DIGEST_TAG) == digest
            ]
            if versions:
                version = versions[0]
            else:
                # The files of a registered version never change.
                path = f"adapter-{digest[:12]}" if registered else "adapter"
                client.log_artifacts(self.id, str(folder), path)
                _unless_there(client.create_registered_model, model)
                source, tags = f"{self._run.info.artifact_uri}/{path}", {DIGEST_TAG: digest}
                version = client.create_model_version(model, source, self.id, tags=tags)
            number = int(version.version)
            if alias is not None:
                client.set_registered_model_alias(model, alias, str(number))
        return number

    def log_file(self, path: Path) -> None:
        """Upload a file to the top of the run's artifacts, unless one of its name and size is there."""
        with _request(UPLOAD_TIMEOUT_S):
            for entry in self._client.list_artifacts(self.id):
                if (entry.path, entry.file_size) == (path.name, path.stat().st_size):
                    return
            self._client.log_artifact(self.id, str(path))

    def end(self, status: str) -> None:
        """End the run."""
        with _request():
            self._client.set_terminated(self.id, status)


class Store:
    """One MLflow store: finds and makes runs. Raises what `LoggedRun` raises."""

    def __init__(self, uri: str, artifacts: str | None, cfg: TrackingConfig) -> None:
        self.uri, self._artifacts, self._cfg = uri, artifacts, cfg

    @functools.cached_property
    def _client(self) -> Any:
        return load_mlflow().MlflowClient(self.uri, registry_uri=self.uri)

    def open_run(self, key: str, name: str) -> LoggedRun:
        """Return the run with this key, made where there is none, running from now on, and what it has."""
        client = self._client
        with _request():
            experiment = client.get_experiment_by_name(self._cfg.experiment)
            if experiment is None:
                _unless_there(client.create_experiment, self._cfg.experiment, self._artifacts)
                experiment = client.get_experiment_by_name(self._cfg.experiment)
            run = self._find_or_create(experiment.experiment_id, key, name, {})
            if run.info.status != "RUNNING":
                client.update_run(run.info.run_id, status="RUNNING")
            logged = LoggedRun(client, run, self._cfg.model_name)
            history = client.get_metric_history(logged.id, "loss")
            logged.steps = {point.step for point in history}
        return logged

    def log_trial(self, parent: LoggedRun, key: str, trial: Trial) -> None:
        """Log a trial that has ended as a run inside `parent`, unless that has been done."""
        with _request():
            experiment_id = parent.experiment_id
            run = self._find_or_create(experiment_id, key, trial.name, {PARENT_TAG: parent.id})
        if run.info.status == trial.status:
            return
        logged = LoggedRun(self._client, run, self._cfg.model_name)
        logged.log_parameters(trial.parameters)
        logged.log_scores(trial.scores)
        logged.end(trial.status)

    def _find_or_create(self, experiment_id: str, key: str, name: str, tags: dict[str, str]) -> Any:
        filter_string = f"tags.`{RUN_KEY_TAG}` = '{key}'"
        runs = self._client.search_runs([experiment_id], filter_string)
        if runs:
            return runs[-1]  # the oldest
        return self._client.create_run(experiment_id, _now_ms(), {RUN_KEY_TAG: key, **tags}, name)


def locate(uri: str | None, folder: Path) -> tuple[str, str | None]:
    """The store's uri, and where artifacts go (None: the server decides)."""
    if uri is None:
        database = folder / "mlflow.db"
    elif re.fullmatch(r"https?://([^\s/@]+@)?(\[[0-9a-fA-F:.]+\]|[\w.-]+)(:\d{1,5})?(/\S*)?", uri):
        return uri, None
    elif re.fullmatch(r"(postgresql|mysql|mssql)(\+\w+)?://\S+", uri):
        return uri, str(folder / "mlartifacts")
    elif re.fullmatch(r"sqlite:///[^?]+", uri):
        database = Path(uri.removeprefix("sqlite:///")).absolute()
    elif re.fullmatch(
        r"(file://)?[^:]+", uri
    ):  # MLflow takes no new runs in plain files: a sqlite file there
        database = Path(uri.removeprefix("file://")).absolute() / "mlflow.db"
    else:
        allowed = "http(s)://host:port, sqlite:///file, a folder, postgresql://, mysql://, mssql://"
        raise ConfigError(one_line(f"tracking.uri: found '{uri}', allowed: {allowed}"))
    if set("%?") & set(
        str(database)
    ):  # MLflow decodes them in some places: files would end up elsewhere
        key = "tracking.uri" if uri else "output_dir"
        raise ConfigError(f"{key}: found '{database}', allowed: a path without % and ?")
    return f"sqlite:///{database}", str(database.parent / "mlartifacts")


@functools.cache
def load_mlflow() -> Any:
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
def _request(timeout_s: int | None = None) -> Generator[None]:
    """Ask MLflow within our limits.

    Raises:
        RefusedError: MLflow answers that this content is not allowed.
    """
    with _limits(timeout_s or REQUEST_TIMEOUT_S):
        try:
            yield
        except Exception as error:
            if getattr(error, "error_code", None) == "INVALID_PARAMETER_VALUE":
                raise RefusedError(error) from error
            raise


@contextmanager
def _limits(timeout_s: int) -> Generator[None]:
    """Set MLflow's HTTP limits for a while, in the environment, where it reads them.

    Limits that the user has set stay.
    """
    limits = {"MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout_s), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    added = {name: value for name, value in limits.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _valid(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with their names in characters that MLflow takes."""
    return {re.sub(r"[^\w\-. /]", "_", key)[:KEY_LENGTH]: values[key] for key in values}


def _now_ms() -> int:
    return int(time.time() * 1000)


def _unless_there(create: Callable[..., Any], *arguments: Any) -> None:
    """Create what another run may have created a moment ago."""
    try:
        create(*arguments)
    except load_mlflow().MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _weights_digest(folder: Path) -> str:
    """SHA-256 over names and contents; not of JSON and Markdown, which differ between two saves of one adapter."""
    digest = hashlib.sha256()
    for path in sorted(
        p for p in folder.rglob("*") if p.is_file() and p.suffix not in {".json", ".md"}
    ):
        with path.open("rb") as file:
            digest.update(
                path.relative_to(folder).as_posix().encode()
                + hashlib.file_digest(file, "sha256").digest()
            )
    return digest.hexdigest()
