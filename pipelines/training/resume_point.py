"""A resume point: what a run goes on from, on any number of workers, and what the finished model is made of.

Rank 0 writes three small files: `trained.safetensors`, the gathered parameters by name; `optimizer.safetensors`, their
moments and the state of the random numbers, while training goes on; and `progress.json`. Beside them lie the norms that
Wanda has pruned by, so that a worker that starts again prunes as before.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ray.train
from ray.train import Checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines.storage.filesystem import send_file

PARAMETERS = "trained.safetensors"
MOMENTS = "optimizer.safetensors"
PROGRESS = "progress.json"
NORMS = "norms.safetensors"


class ResumePoint(NamedTuple):
    """`parameters` and their `moments` by name, these with `rng`, the state of the random numbers; no moments where
    nothing has been trained yet, or all has. `progress` has the step to go on from, and what the run has cost."""

    progress: dict[str, Any]
    parameters: dict[str, Tensor]
    moments: dict[str, Tensor] | None
    norms: Mapping[str, Tensor] | None


def read_point(checkpoint: Checkpoint) -> ResumePoint:
    """Load a resume point."""
    with checkpoint.as_directory() as folder:
        found = {path.name: load_file(path) for path in Path(folder).glob("*.safetensors")}
        progress = json.loads((Path(folder) / PROGRESS).read_text())
    return ResumePoint(progress, found[PARAMETERS], found.get(MOMENTS), found.get(NORMS))


def read_norms(checkpoint: Checkpoint | None) -> Mapping[str, Tensor] | None:
    """The norms alone, which are needed before there is a model; None where there are none."""
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        path = Path(folder) / NORMS
        return load_file(path) if path.exists() else None


def report_point(point: ResumePoint, output_dir: str) -> None:
    """Hand a resume point to Ray Train, which keeps it beside the results in `output_dir`. On rank 0 alone."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file(point.parameters, folder / PARAMETERS)
        if point.moments is not None:
            save_file(point.moments, folder / MOMENTS)
        if point.norms is not None:
            save_file(dict(point.norms), folder / NORMS)
        (folder / PROGRESS).write_text(json.dumps(point.progress))
        upload = _send if "://" in output_dir else None
        ray.train.report(
            point.progress, checkpoint=Checkpoint.from_directory(name), checkpoint_upload_fn=upload
        )


def _send(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """To an object store as Ray would, but for `copy_files`, which does not tell of a file that could not be sent."""
    storage: Any = ray.train.get_context().get_storage()
    path = storage.build_checkpoint_path_from_name(name)
    for file in Path(checkpoint.path).iterdir():
        send_file(file, storage.storage_filesystem, f"{path}/{file.name}")
    return Checkpoint(path, storage.storage_filesystem)
