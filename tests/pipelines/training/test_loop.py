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
from pipelines.training import loop as training_loop
from pipelines.training.loop import TrainingLoop
from pipelines.training.worker import Worker
from pipelines.training.worker_rows import sampled_tokens
from rfa.batch import Row, collate


def sampled(cfg: UnlearnConfig, batches: list[list[Row]]) -> list[Row]:
    """The retain rows of the batches that are sampled, as a worker reads them."""
    worker: Any = object.__new__(Worker)
    worker.job = SimpleNamespace(cfg=cfg, batches={"retain": len(batches)})
    worker.engine = SimpleNamespace(device="cpu")
    worker.sampled_rows = 0
    worker.rows = SimpleNamespace(
        retain_batches=lambda start: (collate(rows, [], 0) for rows in batches[start:])
    )
    worker.all_reduce = lambda values: values
    found: list[Row] = []
    for rows, (_, tokens) in zip(batches, worker.sampled_batches(), strict=True):
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


@pytest.fixture
def loop(cfg: UnlearnConfig, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The first worker's loop of 9 steps on answers, with resume points every 3.

    It keeps in `taken` how far the steps are by the objective, in `messages` and `reports` what it says.
    """
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: None)
    on_outputs = {"retain": 0, "forget": 0, "output": 1}
    values = {f"objective.weights.{name}": weight for name, weight in on_outputs.items()}
    values |= {"solve.mode": "off", "train.steps": 9, "train.checkpoint_every": 3}
    values |= {"objective.output": "masc", "objective.stop_at": 0.5, "train.forget_batch_size": 12}
    cfg = with_values(cfg, values)
    worker: Any = object.__new__(Worker)
    messages: list[Any] = []
    worker.job = SimpleNamespace(
        cfg=cfg, steps=9, rate=lambda _: 0.1, messages=SimpleNamespace(put=messages.append)
    )
    worker.module, worker.engine = build_alignment(cfg), SimpleNamespace(device="cpu")
    worker.rank = 0
    worker.rows = SimpleNamespace(
        steps=lambda _start: itertools.repeat(None),
        once=lambda name, batches: itertools.repeat([name], batches),
        collate=lambda retain, forget, _: collate(retain, [Row([3, 4], 1) for _ in forget], 0),
    )
    loop: Any = TrainingLoop(worker)
    loop.taken, loop.messages, loop.reports = [], messages, []

    def step(_rows: None, _rate: float) -> dict[str, float]:
        loop.taken.append(loop.module.progress)
        return {"tokens": 1.0}

    loop.step = step
    loop._report = lambda step, final: loop.reports.append((step, final))
    return loop


def test_the_objective_knows_the_share_of_the_steps(
    loop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_loop, "has_forgotten", lambda *_: False)
    loop.run()
    assert loop.taken == [step / 9 for step in range(1, 10)]
    assert loop.reports == [(3, False), (6, False), (9, True)]
    assert [message["step"] for message in loop.messages] == list(range(9))


def test_once_enough_is_forgotten_no_step_is_left(
    loop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []

    def has_forgotten(module: Any, watched: list[Any], _total: Any) -> bool:
        assert module is loop.module
        assert len(watched) == 3, "32 rows in batches of 12"
        looked.append(len(loop.taken))
        return len(loop.taken) >= 5

    monkeypatch.setattr(training_loop, "has_forgotten", has_forgotten)
    loop.run()
    assert looked == [2, 4, 6]
    assert len(loop.taken) == 6
    assert loop.messages[-1] == {"stopped_after": 6}
    # A resume point of step 6 would go on from there.
    assert loop.reports == [(3, False), (9, True)]
