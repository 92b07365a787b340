"""Sums of some workers, taken up by more or fewer of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ray.train import Checkpoint

from pipelines.training import statistics_point as module
from pipelines.training.statistics_point import (
    StatisticsPoint,
    add_statistics,
    read_statistics,
    report_statistics,
)
from rfa.adapters import attach
from rfa.batch import collate
from rfa.objective import ResidualAlignment
from rfa.settings import Objective, SolveSettings
from rfa.solver import OnePassSolver
from tests.rfa.conftest import tiny_model, tiny_rows

WORKERS = 3
POINT = StatisticsPoint(batches=7, rows=40, tokens=90, seconds=1.5, files=WORKERS)


def solver() -> OnePassSolver:
    model = attach(tiny_model(), rank=2, alpha=2, targets=["o_proj", "down_proj"])
    alignment = ResidualAlignment(model, Objective(target="cluster_mean"))
    return OnePassSolver(alignment, SolveSettings(mode="blockwise"))


def collected(number: int, into: OnePassSolver) -> OnePassSolver:
    """A solver that has read one worker's rows."""
    rows = tiny_rows(6, seed=number)
    rows = [
        row._replace(row=10 * number + index, label=index % 2) for index, row in enumerate(rows)
    ]
    rows[number] = rows[number]._replace(utility=True)
    into.collect(collate(rows, [], 0), sample_tokens=2)
    return into


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """What three workers have reported."""
    folder = tmp_path_factory.mktemp("point")

    def keep(metrics: dict[str, Any], reported: Path, _output_dir: str) -> None:
        assert metrics == POINT._asdict()
        for path in reported.iterdir():
            assert not (folder / path.name).exists(), "no worker writes another's file"
            path.rename(folder / path.name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "report_folder", keep)
        for rank in range(WORKERS):
            norms = {"layer": torch.ones(2)} if rank == 0 else None
            report_statistics(POINT, collected(rank, solver()), rank, norms, "")
    return Checkpoint.from_directory(folder)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_each_row_counts_once_whatever_the_number_of_workers(
    checkpoint: Checkpoint, workers: int
) -> None:
    whole = solver()
    for rank in range(WORKERS):
        collected(rank, whole)
    parts: list[OnePassSolver] = []
    for rank in range(workers):
        parts.append(solver())
        add_statistics(checkpoint, POINT.files, parts[-1], rank, workers)
    for kind, of_kind in whole.sums.items():
        for name, sums in of_kind.items():
            own = [part.sums[kind][name] for part in parts if name in part.sums[kind]]
            assert sum(one.count for one in own) == sums.count > 0
            assert sum(one.trace for one in own) == pytest.approx(sums.trace)
            total = torch.stack([one.sum_DL for one in own]).sum(0)
            torch.testing.assert_close(total, sums.sum_DL)
    for name, features in whole.features.items():
        merged = parts[0].features[name]
        for part in parts[1:]:
            merged.merge(part.features[name])
        assert merged.count == features.count > 0
        torch.testing.assert_close(merged.sum_D, features.sum_D)
        assert merged.sample.keys() == features.sample.keys()
        assert {label: count for label, (count, _) in merged.by_label.items()} == {
            label: count for label, (count, _) in features.by_label.items()
        }


def test_a_point_says_what_was_read_and_another_one_nothing(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    assert read_statistics(checkpoint) == POINT
    assert read_statistics(None) is None
    (tmp_path / "trained.safetensors").write_bytes(b"")
    assert read_statistics(Checkpoint.from_directory(tmp_path)) is None


def test_a_missing_file_is_an_error_and_no_loss(checkpoint: Checkpoint) -> None:
    with pytest.raises(AssertionError, match=r"statistics-3.pt is missing"):
        add_statistics(checkpoint, WORKERS + 1, solver(), 0, 1)
