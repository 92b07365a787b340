"""A resume point within the solver's statistics: sums over the batches that have been read.

Each module's sums lie on the worker that owns it, which writes them. They add up, so that workers
of another number share the files out and go on from the same batch: each row counts once.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ray.train import Checkpoint
from safetensors.torch import save_file
from torch import Tensor

from pipelines.training.resume_point import NORMS, open_file, report_folder
from rfa.moments import InputMoments
from rfa.solver import OnePassSolver
from rfa.targets import FeatureSums

FILE_NAME = "statistics.json"


class StatisticsPoint(NamedTuple):
    """What all workers know of a resume point: the sums lie in so many files.

    `batches` have been read, with `tokens` in them, and `rows` of the retain set.
    """

    batches: int
    rows: int
    tokens: int
    seconds: float
    files: int


def report_statistics(
    point: StatisticsPoint,
    solver: OnePassSolver,
    rank: int,
    norms: Mapping[str, Tensor] | None,
    output_dir: str,
) -> None:
    """Report the sums to Ray Train, on every worker and at the same batch."""
    solver.settle()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(_sums_of(solver), folder / _file_name(rank))
        if rank == 0:
            (folder / FILE_NAME).write_text(json.dumps(point._asdict()))
            if norms is not None:
                save_file(dict(norms), folder / NORMS)
        report_folder(point._asdict(), folder, output_dir)


def read_statistics(checkpoint: Checkpoint | None) -> StatisticsPoint | None:
    """Return what a resume point knows; None where the checkpoint is another one."""
    if checkpoint is None:
        return None
    with open_file(checkpoint, FILE_NAME) as file:
        return None if file is None else StatisticsPoint(**json.loads(file.read()))


def add_statistics(
    checkpoint: Checkpoint, files: int, solver: OnePassSolver, rank: int, world_size: int
) -> None:
    """Add this worker's part of a point's sums to a solver, one file after another."""
    for number in range(rank, files, world_size):
        with open_file(checkpoint, _file_name(number)) as file:
            assert file is not None, f"{_file_name(number)} is missing in the resume point"
            _add_sums(solver, torch.load(file, map_location="cpu"))


def _file_name(rank: int) -> str:
    return f"statistics-{rank}.pt"


def _sums_of(solver: OnePassSolver) -> dict[str, Any]:
    """Return a solver's sums in tensors and plain values."""
    moments: dict[str, dict[str, tuple[Tensor, float, float]]] = {}
    for kind, of_kind in solver.sums.items():
        moments[kind] = {
            name: (sums.sum_DL, sums.count, sums.trace) for name, sums in of_kind.items()
        }
    features = {name: vars(sums) for name, sums in solver.features.items()}
    return {"moments": moments, "features": features}


def _add_sums(solver: OnePassSolver, sums: Mapping[str, Any]) -> None:
    for kind, of_kind in sums["moments"].items():
        for name, values in of_kind.items():
            solver.sums_of(kind, name).merge(InputMoments(name, *values))
    for name, values in sums["features"].items():
        solver.features[name].merge(FeatureSums(**values))
