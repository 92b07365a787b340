"""One MLflow store: where it is, its runs, and how a record gets into it. Nothing else here knows MLflow."""

import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.config.schema import ConfigError, TrackingConfig

REQUEST_TIMEOUT_S = 5
UPLOAD_TIMEOUT_S = 120
KEY_LENGTH, VALUE_LENGTH, DIGEST_LENGTH = (
    250,
    6000,
    36,
)  # limits in mlflow/utils/validation.py, 3.17
RUN_KEY_TAG = "ray_unlearn.run_key"
PARENT_TAG = "mlflow.parentRunId"  # mlflow/utils/mlflow_tags.py
DIGEST_TAG = "ray_unlearn.adapter_digest"
UPLOADS = ("adapter", "artifact")

Record = dict[str, Any]


class RefusedError(Exception):
    """The server answers, and will never take this record."""


class Store:
    """One MLflow store: finds runs, writes records. Raises whatever MLflow, a driver or a cloud's client raises."""

    def __init__(self, uri: str, artifacts: str | None, cfg: TrackingConfig) -> None:
        self.uri, self._artifacts, self._cfg = uri, artifacts, cfg
        self.versions: dict[str, int] = {}  # registered versions by adapter folder
        self._run_ids: dict[str, str] = {}

    @functools.cached_property
    def _client(self) -> Any:
        return load_mlflow().MlflowClient(self.uri, registry_uri=self.uri)

    def write(self, records: list[Record]) -> str:
        """Write records of one kind and run, and return the run's id.

        Raises:
            RefusedError: the server answers that this content is not allowed, or a file to upload is gone.
        """
        first = records[0]
        kind, key = first["kind"], first["run_key"]
        if kind in UPLOADS and not Path(first["path"]).exists():
            raise RefusedError(f"{first['path']} is gone")
        known_id = self._run_ids.pop(
            key, None
        )  # forgotten when this fails, in case the run is gone
        with _limits(REQUEST_TIMEOUT_S):
            run = None if known_id and kind == "metrics" else self._find_run(first)
        run_id = str(run.info.run_id if run else known_id)
        try:
            with _limits(UPLOAD_TIMEOUT_S if kind in UPLOADS else REQUEST_TIMEOUT_S):
                self._write(run_id, run, records)
        except Exception as error:
            if run is not None and getattr(error, "error_code", None) == "INVALID_PARAMETER_VALUE":
                raise RefusedError(error) from error
            raise
        self._run_ids[key] = run_id
        return run_id

    def _find_run(self, record: Record) -> Any:
        """The record's run, made where it is not there yet; inside its parent's, where it has one."""
        client, name = self._client, self._cfg.experiment
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            _unless_there(client.create_experiment, name, self._artifacts)
            experiment = client.get_experiment_by_name(name)

        def run_of(key: str) -> Any:
            found = client.search_runs(
                [experiment.experiment_id], f"tags.`{RUN_KEY_TAG}` = '{key}'"
            )
            return found[-1] if found else None  # the oldest

        run = run_of(record["run_key"])
        if run is not None:
            return run
        tags = {RUN_KEY_TAG: record["run_key"]}
        parent = run_of(record["parent_key"]) if "parent_key" in record else None
        if parent is not None:
            tags[PARENT_TAG] = parent.info.run_id
        return client.create_run(
            experiment.experiment_id, record["time_ms"], tags, record["run_name"]
        )

    def _write(self, run_id: str, run: Any, records: list[Record]) -> None:
        client, entities, first = self._client, load_mlflow().entities, records[0]
        match first["kind"]:
            case "open":
                client.update_run(run_id, status="RUNNING")
            case "parameters":  # MLflow never changes one
                values, known = first["values"], run.data.params
                changed = [key for key in values if known.get(key, values[key]) != values[key]]
                client.log_batch(
                    run_id,
                    params=[entities.Param(key, values[key]) for key in values if key not in known],
                    tags=[
                        entities.RunTag(f"resumed.{key}"[:KEY_LENGTH], values[key])
                        for key in changed
                    ],
                )
            case "metrics" | "scores":
                points = (
                    (r["step"], r["time_ms"], *item)
                    for r in records
                    for item in r["values"].items()
                )
                metrics = [
                    entities.Metric(key, value, time_ms, step)
                    for step, time_ms, key, value in points
                ]
                client.log_batch(run_id, metrics)
            case "dataset":
                profile, context = (
                    {"num_rows": first["rows"]},
                    entities.InputTag("mlflow.data.context", first["set"]),
                )
                dataset = entities.Dataset(
                    first["set"], first["digest"], "ray_unlearn", "{}", profile=json.dumps(profile)
                )
                client.log_inputs(run_id, [entities.DatasetInput(dataset, [context])])
            case "adapter":
                model = first["model"] or self._cfg.model_name
                self.versions[first["path"]] = version = self._register(
                    run, Path(first["path"]), model
                )
                if first.get("alias"):
                    client.set_registered_model_alias(model, first["alias"], str(version))
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
        place = (
            "adapter" if not versions else f"adapter-{digest[:12]}"
        )  # a registered version's files never change
        client.log_artifacts(run_id, str(folder), place)
        _unless_there(client.create_registered_model, model)
        source, tags = f"{run.info.artifact_uri}/{place}", {DIGEST_TAG: digest}
        return int(client.create_model_version(model, source, run_id, tags=tags).version)


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


def one_line(text: str) -> str:
    """The text without line breaks and without the password that a uri may hold."""
    return re.sub(r"//[^/@\s]*@", "//", " ".join(text.split()))[:600]
