"""The one-pass solver on real Ray Train: the same adapter from any number of workers, and with a worker killed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch
from torch import Tensor

from pipelines.config.schema import UnlearnConfig
from tests.processes import train_workers
from tests.trained import Trained, fit, fit_all, products_of

Quick = Callable[..., UnlearnConfig]
# Long before the solver's noise of float32 sums in another order matters: relative to the largest entry of B A.
TOLERANCE = 1e-3
SOLVE = ("train.steps=0", "solve.strength=0.1", "train.deepspeed.stage=0")


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert set(one) == set(other)
    for name, expected in other.items():
        assert float(expected.abs().max()) > 1e-3
        torch.testing.assert_close(
            one[name], expected, rtol=0, atol=TOLERANCE * float(expected.abs().max())
        )


class Together(NamedTuple):
    """What two workers solve one run after another."""

    reference: Trained
    zero_3: Trained
    by_holdout: Trained


@pytest.fixture(scope="module")
def together(ray_session: None, quick: Quick, tmp_path_factory: pytest.TempPathFactory) -> Together:
    folder = tmp_path_factory.mktemp("together")
    out = f"output_dir={folder}"
    return Together(
        *fit_all(
            folder,
            quick(*SOLVE, out),
            quick(*SOLVE, "train.deepspeed.stage=3", out),
            quick("train.steps=0", "solve.strength=auto", out),
        )
    )


@pytest.fixture(scope="module")
def reference(together: Together) -> dict[str, Tensor]:
    """The adapter of two workers."""
    return products_of(together.reference)


def test_the_adapter_is_the_same_under_zero_3(
    together: Together, reference: dict[str, Tensor]
) -> None:
    assert_same(products_of(together.zero_3), reference)


@pytest.mark.parametrize(
    "changes",
    [("train.num_workers=1",), ("train.num_workers=4", "train.cpus_per_worker=0.5")],
    ids=["one worker", "four workers"],
)
def test_the_adapter_is_the_same(
    reference: dict[str, Tensor], quick: Quick, tmp_path: Path, changes: tuple[str, ...]
) -> None:
    cfg = quick(*SOLVE, *changes, f"output_dir={tmp_path}")
    assert_same(products_of(fit_all(tmp_path, cfg)[0]), reference)


def test_a_run_whose_worker_is_killed_while_polishing_keeps_what_was_solved(
    reference: dict[str, Tensor], quick: Quick, tmp_path: Path
) -> None:
    # A learning rate so small that polishing changes nothing: what is left is the solution of the first attempt.
    cfg = quick(*SOLVE, "train.steps=40", "train.learning_rate=1e-12", f"output_dir={tmp_path}")
    heard: list[dict[str, Any]] = []
    workers: set[psutil.Process] = set()

    def kill_once(message: dict[str, Any]) -> None:
        heard.append(message)
        own = train_workers(psutil.Process())
        workers.update(own)
        if message.get("step") == 30 and sum(m.get("step") == 30 for m in heard) == 1:
            own[-1].kill()

    trained = fit(cfg, kill_once)
    steps = [message["step"] for message in heard if "step" in message]
    assert steps.count(0) == 1 and set(steps) == set(range(40)), "it went on from a resume point"
    assert len(workers) == 4, "two others went on"
    assert (
        sum(message.get("done") == 1 and message.get("what") == "statistics" for message in heard)
        == 1
    )
    assert trained.metrics["solve_s"] > 0
    assert_same(products_of(trained), reference)


def test_a_run_whose_worker_is_killed_while_reading_goes_on_from_what_was_counted(
    reference: dict[str, Tensor], quick: Quick, tmp_path: Path
) -> None:
    read: list[int] = []

    def kill_once(message: dict[str, Any]) -> None:
        if message.get("what") == "statistics":
            read.append(message["done"])
            if message["done"] == 18 and read.count(18) == 1:
                train_workers(psutil.Process())[-1].kill()

    points = ("train.retain_batch_size=2", "solve.checkpoint_every=1")
    cfg = quick(*SOLVE, *points, f"output_dir={tmp_path}")
    trained = fit(cfg, kill_once)
    number = read[-1]
    start = next(index for index in range(1, len(read)) if read[index] <= read[index - 1])
    assert 18 <= read[start - 1] < number
    assert read[start] > 9, "it did not begin anew"
    assert read[start:] == list(range(read[start], number + 1))
    # A row that counted twice, or never, would weigh more or less.
    assert_same(products_of(trained), reference)
    again = fit(cfg)
    assert_same(products_of(again), reference)
    assert not again.messages, "what was finished is not solved again"


def test_the_strength_is_found_by_the_holdout_set(together: Together) -> None:
    trials = together.by_holdout.metrics["trials"]
    assert len({trial["strength"] for trial in trials}) == len(trials) > 0
    assert abs(trials[-1]["gap"]) == min(abs(trial["gap"]) for trial in trials)
