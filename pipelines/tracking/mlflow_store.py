"""Read and write the runs of an MLflow store. No other module imports MLflow."""

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
from pipelines.config.text import one_line
from pipelines.tracking.contents import Trial

REQUEST_TIMEOUT_S = 5
UPLOAD_TIMEOUT_S = 120
# The limits of mlflow/utils/validation.py, 3.17.
KEY_LENGTH = 250
VALUE_LENGTH = 6000
DIGEST_LENGTH = 36
RUN_KEY_TAG = "ray_unlearn.run_key"
# From mlflow/utils/mlflow_tags.py.
PARENT_TAG = "mlflow.parentRunId"
DIGEST_TAG = "ray_unlearn.adapter_digest"


class RefusedError(Exception):
    """The server answers, and will never take this record."""


class LoggedRun:
    """A run in MLflow. Every method sends only the part that MLflow lacks.

    Methods raise the errors of MLflow, of a database driver or of a cloud's client.
    """

    def __init__(self, client: Any, run: Any, model_name: str) -> None:
        self.id: str = run.info.run_id
        self.experiment_id: str = run.info.experiment_id
        self._client, self._run, self._model_name = client, run, model_name
        self.steps: set[int] = set()

    def log_parameters(self, parameters: Mapping[str, str]) -> None:
        """Log parameters. A changed value becomes a tag such as `resumed.train.steps`."""
        # MLflow refuses to change a parameter.
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
        entities = load_mlflow().entities
        metrics: list[Any] = []
        for step, values in steps.items():
            for key, value in _valid(values).items():
                metrics.append(entities.Metric(key, float(value), now_ms, step))
        # Before the request, so that steps that are refused are not tried again.
        self.steps |= steps.keys()
        with _request():
            self._client.log_batch(self.id, metrics)

    def log_scores(self, scores: Mapping[str, float]) -> None:
        """Log metrics without steps."""
        known, now_ms = self._run.data.metrics, _now_ms()
        entities = load_mlflow().entities
        metrics: list[Any] = []
        for key, value in _valid(scores).items():
            # MLflow would keep an equal value as one more point of the metric's history.
            if known.get(key) != value:
                metrics.append(entities.Metric(key, value, now_ms, 0))
        with _request():
            self._client.log_batch(self.id, metrics)

    def log_dataset(self, name: str, digest: str, rows: int) -> None:
        """Log a set's name, digest and number of rows, and nothing of its content."""
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
        """Upload a PEFT folder, register it as `tracking.model_name`, and return its version.

        Identical weights are registered once. `alias` moves to that version.
        """
        client, model = self._client, self._model_name
        with _request(UPLOAD_TIMEOUT_S):
            digest = _weights_digest(folder)
            registered = client.search_model_versions(f"run_id = '{self.id}'")
            version = None
            for candidate in registered:
                if candidate.name == model and candidate.tags.get(DIGEST_TAG) == digest:
                    version = candidate
                    break
            if version is None:
                # Later weights need another path, as a version's files must never change.
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
        """Upload a file to the run's artifacts, unless one of its name and size is there."""
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
    """An MLflow store, which finds and makes runs. It raises the same as `LoggedRun`."""

    def __init__(self, uri: str, artifacts: str | None, cfg: TrackingConfig) -> None:
        self.uri, self._artifacts, self._cfg = uri, artifacts, cfg

    @functools.cached_property
    def _client(self) -> Any:
        # Made at first use, as it imports MLflow, which takes seconds.
        return load_mlflow().MlflowClient(self.uri, registry_uri=self.uri)

    def open_run(self, key: str, name: str) -> LoggedRun:
        """Return the run with this key with its content in MLflow. Make one if there is none."""
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
            # Every step has a loss, and its metrics arrived together with it or not at all.
            history = client.get_metric_history(logged.id, "loss")
            logged.steps = {point.step for point in history}
        return logged

    def log_trial(self, parent: LoggedRun, key: str, trial: Trial) -> None:
        """Log a trial that has ended as a run inside `parent`, unless MLflow has it."""
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
        """Return MLflow's record of the oldest run with this key, or of a new one."""
        filter_string = f"tags.`{RUN_KEY_TAG}` = '{key}'"
        runs = self._client.search_runs([experiment_id], filter_string)
        if runs:
            # MLflow lists the newest first. Two processes that began at once may each have made one.
            return runs[-1]
        return self._client.create_run(experiment_id, _now_ms(), {RUN_KEY_TAG: key, **tags}, name)


def locate(uri: str | None, folder: Path) -> tuple[str, str | None]:
    """Return the store's URI and the address of its artifacts, None if the server decides.

    Raises:
        ConfigError: MLflow cannot take `uri`.
    """
    if uri is None:
        database = folder / "mlflow.db"
    elif re.fullmatch(r"https?://([^\s/@]+@)?(\[[0-9a-fA-F:.]+\]|[\w.-]+)(:\d{1,5})?(/\S*)?", uri):
        return uri, None
    elif re.fullmatch(r"(postgresql|mysql|mssql)(\+\w+)?://\S+", uri):
        return uri, str(folder / "mlartifacts")
    elif re.fullmatch(r"sqlite:///[^?]+", uri):
        database = Path(uri.removeprefix("sqlite:///")).absolute()
    elif re.fullmatch(r"(file://)?[^:]+", uri):
        # MLflow takes no new runs in plain files, so a folder gets a SQLite file.
        database = Path(uri.removeprefix("file://")).absolute() / "mlflow.db"
    else:
        allowed = "http(s)://host:port, sqlite:///file, a folder, postgresql://, mysql://, mssql://"
        raise ConfigError(one_line(f"tracking.uri: found '{uri}', allowed: {allowed}"))
    # MLflow decodes both characters in some places, and files would end up elsewhere.
    if set("%?") & set(str(database)):
        key = "tracking.uri" if uri else "output_dir"
        raise ConfigError(f"{key}: found '{database}', allowed: a path without % and ?")
    return f"sqlite:///{database}", str(database.parent / "mlartifacts")


@functools.cache
def load_mlflow() -> Any:
    """Import MLflow, and let it send no usage data and print nothing."""
    # It is imported late, as that takes seconds.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow
    import mlflow.store.db.utils

    # Its ten attempts at a database that is down would take 100 s.
    mlflow.store.db.utils.MAX_RETRY_COUNT = 1
    # Their messages go to the logging of the application, and not to stderr.
    for name in ("mlflow", "alembic"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [logging.NullHandler()], True
    return mlflow


@contextmanager
def _request(timeout_s: int | None = None) -> Generator[None]:
    """Ask MLflow within the scope, under this module's limits of time and attempts.

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
    """Set MLflow's HTTP limits within the scope, but for those that the user has set."""
    # MLflow reads them from the environment. Its defaults, 120 s for a request and seven more
    # attempts, would hold up a run for minutes when a server is down.
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
    valid: dict[str, Any] = {}
    for key, value in values.items():
        valid[re.sub(r"[^\w\-. /]", "_", key)[:KEY_LENGTH]] = value
    return valid


def _now_ms() -> int:
    return int(time.time() * 1000)


def _unless_there(create: Callable[..., Any], *arguments: Any) -> None:
    """Create something, unless another run has created it a moment ago."""
    try:
        create(*arguments)
    except load_mlflow().MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _weights_digest(folder: Path) -> str:
    """Return the SHA-256 of an adapter's files, over their names and contents."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        # JSON and Markdown differ between two saves of one adapter.
        if not path.is_file() or path.suffix in {".json", ".md"}:
            continue
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
