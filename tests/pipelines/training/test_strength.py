"""The search for the strength, without a model."""

import math

import pytest

from pipelines.config.schema import SolveConfig
from pipelines.evaluation.metrics.membership import chance_gap
from pipelines.training.strength import (
    CLOSE_ENOUGH,
    TRIALS,
    Likelihood,
    auc_gap,
    search_strength,
)


def rows(*values: float) -> list[Likelihood]:
    return [Likelihood(loss=value, min_k=value) for value in values]


def test_the_gap_is_a_half_where_every_forget_row_is_better_known() -> None:
    assert auc_gap(rows(1, 2), rows(3, 4)) == 0.5
    assert auc_gap(rows(3, 4), rows(1, 2)) == -0.5
    assert auc_gap(rows(1, 4), rows(2, 3)) == 0.0  # of four pairs, two have the holdout row above


def test_the_gap_is_the_mean_of_both_scores() -> None:
    forget, holdout = [Likelihood(loss=1, min_k=9)], [Likelihood(loss=2, min_k=8)]
    assert auc_gap(forget, holdout) == 0.0


@pytest.mark.parametrize("right", [1e-5, 3e-4, 2e-3, 0.04, 0.9, 30.0])
def test_the_search_ends_near_the_right_strength(right: float) -> None:
    tried: list[float] = []

    def try_strength(strength: float) -> float:
        tried.append(strength)
        return max(
            -0.5, min(0.5, 0.4 * (right / strength) ** 0.5 - 0.4)
        )  # 0 at the right one, ever flatter above it

    trials = search_strength(try_strength, aim=0.0, trials=12)
    assert len(tried) == len(trials) <= 12
    assert trials[-1].strength == pytest.approx(right, rel=0.25)
    assert abs(trials[-1].gap) == min(abs(trial.gap) for trial in trials)


@pytest.mark.parametrize(
    ("right", "slope", "most"),
    [(1e-3, 0.9, 3), (4e-3, 1.5, 2), (4e-3, 3.0, 4), (0.02, 3.0, 5), (1.0, 0.9, 6), (1.0, 1.5, 6)],
)
def test_a_logistic_gap_takes_few_trials(right: float, slope: float, most: int) -> None:
    trials = search_strength(
        lambda strength: -0.5 * math.tanh(slope * math.log(strength / right)), aim=0.05
    )
    assert len(trials) <= most
    assert abs(trials[-1].gap - 0.05) <= CLOSE_ENOUGH


@pytest.mark.parametrize("first", [2e-3, 50.0])
def test_a_gap_that_hardly_falls_is_closed_too(first: float) -> None:
    trials = search_strength(lambda strength: 0.0675 - 0.065 * strength**0.5, aim=0.0, first=first)
    assert abs(trials[-1].gap) <= CLOSE_ENOUGH, (
        "as of a classifier's rows: 0.067 at 0.002, -0.01 at 1.4"
    )


def test_a_better_first_guess_takes_fewer_trials() -> None:
    counts = []
    for first in (0.1, 0.005):
        trials = search_strength(
            lambda strength: -0.5 * math.tanh(2 * math.log(strength / 0.004)), 0.05, first=first
        )
        counts.append(len(trials))
    assert counts[1] < counts[0]


def test_equally_close_strengths_give_the_weaker() -> None:
    trials = search_strength(lambda strength: 0.2 if strength < 3e-3 else -0.2, aim=0.0)
    assert len(trials) == TRIALS
    assert trials[-1].gap == 0.2
    assert trials[-1].strength == min(trial.strength for trial in trials)


def test_a_gap_that_never_closes_ends_with_the_closest() -> None:
    assert search_strength(lambda _strength: 0.4, aim=0.1)[-1].gap == 0.4


def test_the_gap_that_chance_makes_vanishes_with_the_number_of_rows() -> None:
    assert chance_gap(1, 1) == 0.5  # one row on each side: whichever is above, AUC is 0 or 1
    assert chance_gap(9, 9) == pytest.approx((19 / 972) ** 0.5)
    assert chance_gap(9000, 9000) < 0.005


def test_the_solver_works_as_configured() -> None:
    chosen = {
        "mode": "one_pass",
        "utility_weight": 3,
        "ridge": 0.1,
        "exact_width": 9,
        "sketch_columns": 5,
        "fact_weight": 7,
    }
    assert SolveConfig(**chosen).settings()._asdict() == chosen


def test_the_search_aims_at_the_gap_it_is_given() -> None:
    trials = search_strength(lambda strength: 0.5 - 100 * strength, aim=0.14, trials=12)
    assert trials[-1].gap == pytest.approx(0.14, abs=0.03)
