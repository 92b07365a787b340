"""The trained attack against classifiers that are trained anew for every pair of rows."""

from math import inf, nan

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.evaluation.metrics.likelihood import TokenStatistics
from pipelines.evaluation.metrics.trained_attack import (
    MOST_ROWS,
    PENALTY,
    outputs_of,
    trained_auc,
)


def drawn(seed: int, rows: int, numbers: int, shift: float = 0.0) -> list[list[float]]:
    return (np.random.default_rng(seed).normal(size=(rows, numbers)) + shift).tolist()


def score(trained: np.ndarray, weight: np.ndarray, label: np.ndarray, row: np.ndarray) -> float:
    """What a weighted ridge regression of its own says of a row."""
    design = np.column_stack([trained, np.ones(len(trained))])
    penalty = np.diag([*np.full(trained.shape[1], PENALTY), 0.0])
    weighted = design.T * weight
    return np.append(row, 1.0) @ np.linalg.solve(weighted @ design + penalty, weighted @ label)


def share_in_order(forget: list[list[float]], unseen: list[list[float]]) -> float:
    """Brute force: a classifier a pair, of the rows that are unlike both of the pair."""
    values = np.array(forget + unseen)
    weight = np.repeat([0.5 / len(forget), 0.5 / len(unseen)], [len(forget), len(unseen)])
    label = np.repeat([-1.0, 1.0], [len(forget), len(unseen)])
    mean = weight @ values
    values = (values - mean) / np.sqrt(weight @ (values - mean) ** 2)
    wins: list[float] = []
    for one in range(len(forget)):
        for other in range(len(forget), len(values)):
            pair = values[[one, other]]
            left = [not any(np.array_equal(row, of_pair) for of_pair in pair) for row in values]
            of_unseen, of_forgotten = (
                score(values[left], weight[left], label[left], values[index])
                for index in (other, one)
            )
            wins.append(float(of_unseen > of_forgotten))
    return float(np.mean(wins))


@pytest.mark.parametrize(("forgotten", "others", "numbers"), [(2, 2, 1), (5, 9, 3), (6, 4, 13)])
def test_no_pair_is_told_apart_by_a_classifier_that_saw_it(
    forgotten: int, others: int, numbers: int
) -> None:
    forget, unseen = drawn(0, forgotten, numbers), drawn(1, others, numbers, 0.3)
    assert trained_auc(forget, unseen) == pytest.approx(share_in_order(forget, unseen))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_row_that_was_drawn_twice_is_left_out_twice(seed: int) -> None:
    draw = np.random.default_rng(seed)
    forget, unseen = drawn(2, 6, 3), drawn(3, 7, 3, 0.5)
    forget = [forget[index] for index in draw.integers(6, size=6)]
    unseen = [unseen[index] for index in draw.integers(7, size=7)]
    auc = trained_auc(forget, unseen)
    if min(len(np.unique(rows, axis=0)) for rows in (forget, unseen)) < 2:
        assert auc is None
    else:
        assert auc == pytest.approx(share_in_order(forget, unseen))


def test_rows_that_are_alike_are_not_told_apart_on_average() -> None:
    aucs = [trained_auc(drawn(seed, 9, 13), drawn(seed + 500, 20, 13)) for seed in range(300)]
    # 300 AUCs with a standard deviation of about 0.15 each.
    assert np.mean([auc for auc in aucs if auc is not None]) == pytest.approx(0.5, abs=0.03)


def test_it_learns_which_way_a_number_points() -> None:
    for shift in (4.0, -4.0):
        assert trained_auc(drawn(0, 9, 5), drawn(1, 20, 5, shift)) == 1.0


def test_a_side_without_two_rows_or_with_broken_numbers_has_no_auc() -> None:
    rows = drawn(0, 4, 2)
    assert trained_auc([], rows) is None
    assert trained_auc(rows[:1] * 3, rows) is None
    for broken in (nan, inf):
        assert trained_auc(rows, [*rows, [broken, 0.0]]) is None


def test_a_number_that_never_changes_tells_nothing() -> None:
    forget, unseen = drawn(0, 5, 2), drawn(1, 6, 2)
    padded = [[[*row, 7.0, 0.0] for row in rows] for rows in (forget, unseen)]
    assert trained_auc(*padded) == pytest.approx(trained_auc(forget, unseen))


def test_of_many_rows_some_are_taken_evenly() -> None:
    rows = [[float(index)] for index in range(3 * MOST_ROWS)]
    # The unseen row of a pair is lower where it lies in the lower half and the other in the upper
    # half, above it: of 1/4 of the pairs, half.
    unseen = [[value + 1.5 * MOST_ROWS] for [value] in rows]
    assert trained_auc(rows, unseen) == pytest.approx(7 / 8, abs=0.002)
    assert trained_auc(rows, unseen) == trained_auc(rows[::3], unseen[::3])
    assert trained_auc(rows, unseen) != trained_auc(rows[1::3], unseen[::3])


def test_the_numbers_of_a_row_are_those_of_its_tokens() -> None:
    tokens = TokenStatistics(
        log_probability=np.array([-1.0, -3.0]),
        is_argmax=np.array([True, False]),
        mean=np.array([-2.0, -2.0]),
        variance=np.array([1.0, 0.25]),
    )
    # Spreads 1 and 1/2; deviations (-1 + 2) / 1 = 1 and (-3 + 2) / (1/2) = -2.
    assert outputs_of(tokens) == [
        *(0.5,),
        *(-2.0, -3.0, -1.0),
        *(-2.0, -2.0, -2.0),
        *(0.75, 0.5, 1.0),
        *(-0.5, -2.0, 1.0),
    ]
    assert outputs_of(tokens.without([0, 1])) is None
