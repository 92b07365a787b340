"""What still holds the rows that a run was to forget: it takes them out of its own model alone.

Known are the forget set's source and the models that this one descends from, with their adapters.
Copies that somebody has made, backups and what was published are not.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from pipelines.config.schema import UnlearnConfig


class Holder(NamedTuple):
    """What holds the rows, and where it lies: a path, a store's address or a hub name."""

    what: str
    place: str


def holders(cfg: UnlearnConfig, manifest: Mapping[str, Any]) -> list[Holder]:
    """Return what holds the forgotten rows, the rows themselves first and then the oldest model.

    A version in MLflow is named where it has a lower number than the run's own.
    """
    found = [Holder("the rows themselves", cfg.data.forget.path)]
    request: Mapping[str, Any] = manifest.get("request") or {}
    for number, run in enumerate(request.get("earlier", []), start=1):
        if number == 1 and run.get("model"):
            found.append(Holder("model before request 1", run["model"]))
        for part in ("model", "adapter"):
            found.append(Holder(f"{part} of request {number}", f"{run['run']}/{part}"))
    model: Mapping[str, Any] = manifest.get("model") or {}
    path = model.get("path") or cfg.model.path
    if path not in [holder.place for holder in found]:
        found.append(Holder("the model that this run began with", path))
    version = (manifest.get("mlflow") or {}).get("model_version") or 1
    if version > 1:
        name = cfg.tracking.model_name
        found.append(Holder(f"adapters in MLflow, versions before {version}", f"models:/{name}"))
    return found
