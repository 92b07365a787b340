"""The worker's loop: what targets are fitted on (rows of the retain set, however few of them stand among the utility
set's), and what it does from step to step.
"""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train

from pipelines.config.load import with_values
from pipelines.config.schema import UnlearnConfig
from pipelines.model.load import build_alignment
from pipelines.training.loop import TrainingLoop, sampled_tokens
from rfa.batch import Row, collate


def sampled(cfg: UnlearnConfig, batches: list[list[Row]]) -> list[Row]:
    """The retain rows of the batches that are sampled, as a worker's loop reads them."""
    loop: Any = object.__new__(TrainingLoop)
    loop.job = SimpleNamespace(cfg=cfg, batches={"retain": len(batches)})
    loop.engine = SimpleNamespace(device="cpu")
    loop.rows = SimpleNamespace(retain_batches=lambda: (collate(rows, [], 0) for rows in batches))
    loop._all_reduce = lambda values: values
    found: list[Row] = []
    for rows, (_, tokens) in zip(batches, loop._sampled_batches(), strict=True):
        if tokens:
            found += [row for row in rows if not row.utility]
    return found


@pytest.mark.parametrize("every", [1, 16, 40])
def test_targets_see_the_retain_rows_beside_a_large_utility_set(
    cfg: UnlearnConfig, every: int
) -> None:
    cfg = with_values(cfg, {"objective.target_rows": 12, "train.retain_batch_size": 8})
    rows = [Row([3, 4, 5], 1, n, utility=n % every != every - 1) for n in range(8 * 100)]
    batches = [rows[start : start + 8] for start in range(0, len(rows), 8)]
    # Rows of whole batches until there are 12, or all there are.
    number = {1: 16, 16: 12, 40: 12}[every]
    assert len(sampled(cfg, batches)) == number


def test_once_enough_rows_were_seen_nothing_is_sampled(cfg: UnlearnConfig) -> None:
    cfg = with_values(cfg, {"objective.target_rows": 12, "train.retain_batch_size": 8})
    assert sampled_tokens(cfg, 11, 100) > 0
    assert sampled_tokens(cfg, 12, 100) == 0
    assert sampled_tokens(cfg, 8, 1) == 0, "there are no more"


def test_the_objective_knows_the_share_of_the_steps(
    cfg: UnlearnConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: None)
    on_outputs = {"retain": 0, "forget": 0, "output": 1}
    values = {f"objective.weights.{name}": weight for name, weight in on_outputs.items()}
    cfg = with_values(cfg, {"solve.mode": "off", "train.steps": 4, **values})
    loop: Any = object.__new__(TrainingLoop)
    loop.job = SimpleNamespace(cfg=cfg, steps=4, rate=lambda _step: 0.1)
    loop.module, loop.rank, loop.seconds = build_alignment(cfg), 1, 0.0
    loop.rows = SimpleNamespace(steps=lambda _start: itertools.repeat(None))
    seen: list[float] = []
    loop.step = lambda _rows, _rate: seen.append(loop.module.progress)
    loop._report = lambda _step, final: None
    loop.run()
    assert seen == [0.25, 0.5, 0.75, 1.0]
