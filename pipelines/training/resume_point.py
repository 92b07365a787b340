"""A resume point: the state that a run continues from, and that the finished model is made of.

It fits any number of workers. Rank 0 writes three small files: `trained.safetensors`, the gathered
parameters by name; `optimizer.safetensors`, their moments and the random number generator's state,
while training goes on; and `progress.json`. `norms.safetensors` holds Wanda's input norms, so that
a restarted worker prunes as before.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ray.train
from pyarrow import fs
from ray.train import Checkpoint
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from pipelines.storage.filesystem import send_file

PARAMETERS = "trained.safetensors"
MOMENTS = "optimizer.safetensors"
PROGRESS = "progress.json"
NORMS = "norms.safetensors"


class ResumePoint(NamedTuple):
    """The state of a run after a step.

    `progress` has the step to continue with and the run's cost so far. `parameters` and `moments`
    are by name. `moments` also has `rng`, the random number generator's state, and is None before
    the first step and after the last one. `norms` is None unless Wanda prunes.
    """

    progress: dict[str, Any]
    parameters: dict[str, Tensor]
    moments: dict[str, Tensor] | None
    norms: Mapping[str, Tensor] | None


def read_point(checkpoint: Checkpoint) -> ResumePoint:
    """Load a resume point."""
    with checkpoint.as_directory() as folder:
        tensors = {path.name: load_file(path) for path in Path(folder).glob("*.safetensors")}
        progress = json.loads((Path(folder) / PROGRESS).read_text())
    return ResumePoint(progress, tensors[PARAMETERS], tensors.get(MOMENTS), tensors.get(NORMS))


def read_norms(checkpoint: Checkpoint | None) -> Mapping[str, Tensor] | None:
    """Load Wanda's input norms alone, which pruning needs before there is a model to resume."""
    if checkpoint is None:
        return None
    with open_file(checkpoint, NORMS) as file:
        return None if file is None else load(file.read())


@contextmanager
def open_file(checkpoint: Checkpoint, name: str) -> Iterator[Any]:
    """Open one file of a checkpoint, None where it has none; the others are not downloaded."""
    filesystem: Any = checkpoint.filesystem
    path = f"{checkpoint.path}/{name}"
    if filesystem.get_file_info(path).type != fs.FileType.File:
        yield None
        return
    with filesystem.open_input_file(path) as file:
        yield file


def report_point(point: ResumePoint, output_dir: str) -> None:
    """Report a resume point from rank 0 to Ray Train, which stores it beside the results."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file(point.parameters, folder / PARAMETERS)
        if point.moments is not None:
            save_file(point.moments, folder / MOMENTS)
        if point.norms is not None:
            save_file(dict(point.norms), folder / NORMS)
        (folder / PROGRESS).write_text(json.dumps(point.progress))
        # A result of Ray Train has only metrics that came with a checkpoint.
        report_folder(point.progress, folder, output_dir)


def report_folder(metrics: dict[str, Any], folder: Path, output_dir: str) -> None:
    """Report a folder as this worker's part of a checkpoint, which lies beside the results."""
    ray.train.report(
        metrics,
        checkpoint=Checkpoint.from_directory(folder),
        checkpoint_upload_fn=upload_checkpoint if "://" in output_dir else None,
    )


def upload_checkpoint(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """Upload a checkpoint to an object store under the path that Ray Train gives it.

    Ray's own upload uses pyarrow's `copy_files`, which ignores a file that could not be sent.
    """
    storage: Any = ray.train.get_context().get_storage()
    path = storage.build_checkpoint_path_from_name(name)
    for file in Path(checkpoint.path).iterdir():
        send_file(file, storage.storage_filesystem, f"{path}/{file.name}")
    return Checkpoint(path, storage.storage_filesystem)
