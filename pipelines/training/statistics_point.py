"""A resume point within the solver's statistics: sums over the batches that have been read.

Every worker writes the sums of its own rows. They add up, so that workers of another number share
the files out and go on from the same batch: each row counts once.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pyarrow import fs
from ray.train import Checkpoint
from safetensors.torch import save_file
from torch import Tensor

from pipelines.training.resume_point import NORMS, report_folder
from rfa.moments import InputMoments
from rfa.solver import OnePassSolver
from rfa.targets import FeatureSums

PREFIX = "statistics-"


class StatisticsPoint(NamedTuple):
    """The sums of some workers' rows.

    `batches` have been read, and `rows` of the retain set in them. `tokens` and `sums` are those of
    the workers whose files were read: `sums` is what `sums_of` returns, a file.
    """

    batches: int
    rows: int
    seconds: float
    tokens: int
    sums: list[dict[str, Any]]


def sums_of(solver: OnePassSolver) -> dict[str, Any]:
    """Return a solver's sums, before they are reduced, in tensors and plain values."""
    moments: dict[str, dict[str, tuple[Tensor, float, float]]] = {}
    for kind, of_kind in solver.sums.items():
        moments[kind] = {
            name: (sums.sum_DL, sums.count, sums.trace) for name, sums in of_kind.items()
        }
    features = {name: vars(sums) for name, sums in solver.features.items()}
    return {"moments": moments, "features": features}


def add_sums(solver: OnePassSolver, sums: Mapping[str, Any]) -> None:
    """Add sums that `sums_of` returned here or on another worker."""
    for kind, of_kind in sums["moments"].items():
        for name, values in of_kind.items():
            solver.sums_of(kind, name).merge(InputMoments(name, *values))
    for name, values in sums["features"].items():
        solver.features[name].merge(FeatureSums(**values))


def report_statistics(
    point: StatisticsPoint, rank: int, norms: Mapping[str, Tensor] | None, output_dir: str
) -> None:
    """Report one worker's sums to Ray Train, at the same batch as all other workers."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(point._asdict(), folder / f"{PREFIX}{rank}.pt")
        if rank == 0 and norms is not None:
            save_file(dict(norms), folder / NORMS)
        report_folder({"batches": point.batches}, folder, output_dir)


def read_statistics(
    checkpoint: Checkpoint | None, rank: int, world_size: int
) -> StatisticsPoint | None:
    """Return this worker's part of a point's sums; None where the checkpoint is no such point."""
    if checkpoint is None:
        return None
    filesystem: Any = checkpoint.filesystem
    listed = filesystem.get_file_info(fs.FileSelector(checkpoint.path))
    paths = sorted(info.path for info in listed if info.base_name.startswith(PREFIX))
    if not paths:
        return None
    # Every worker reads a file, for what all have in common. Its sums count on one worker.
    own = paths[rank::world_size]
    points: list[StatisticsPoint] = []
    for path in own or paths[:1]:
        with filesystem.open_input_file(path) as file:
            points.append(StatisticsPoint(**torch.load(file, map_location="cpu")))
    sums = [one.sums[0] for one in points if own]
    tokens = sum(one.tokens for one in points if own)
    return points[0]._replace(tokens=tokens, sums=sums)
