"""Membership scores, their AUC and privleak, against numbers worked out by hand."""

import zlib
from math import inf, nan

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.evaluation.metrics.membership import (
    auc,
    min_k,
    min_k_plus_plus,
    privleak,
    reference_score,
    zlib_score,
)

SCORES = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=8)


def test_the_zlib_score_divides_by_the_compressed_bytes_of_the_answer():
    assert zlib_score(3.0, "été") == 3.0 / len(zlib.compress("été".encode()))
    assert zlib_score(3.0, "a" * 1000) > zlib_score(
        3.0, "".join(map(chr, range(33, 126)))
    )  # 1000 a's compress well


def test_the_reference_score_is_the_loss_above_the_oracle():
    assert reference_score(3.0, 1.0) == 2.0


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [
        (1, 1.0),  # int(0.4) = 0, but at least one token
        (4, 4.0),  # int(1.6) = 1: the lowest
        (5, 4.5),  # int(2.0) = 2: the lowest two, 5 and 4
        (10, 8.5),  # 4: 10, 9, 8, 7
    ],
)
def test_min_k_averages_the_least_likely_two_fifths(num_tokens: int, expected: float):
    log_probability = -np.arange(1.0, num_tokens + 1)
    assert min_k(log_probability) == expected
    assert min_k(log_probability[::-1]) == expected


def test_min_k_plus_plus_counts_in_standard_deviations():
    # z = (-3 + 1) / 2 = -1 and (-1 + 1) / 1 = 0; m = 1
    assert (
        min_k_plus_plus(np.array([-3.0, -1.0]), np.array([-1.0, -1.0]), np.array([4.0, 1.0])) == 1.0
    )


def test_min_k_plus_plus_floors_the_variance_at_a_millionth():
    assert min_k_plus_plus(np.array([-2.0]), np.array([-1.0]), np.array([0.0])) == pytest.approx(
        1000.0
    )


def test_an_answer_of_eos_alone_has_no_score_over_tokens():
    assert min_k(np.array([])) is None
    assert min_k_plus_plus(np.array([]), np.array([]), np.array([])) is None


def test_a_forget_set_easier_than_the_holdout_has_an_auc_of_one():
    assert auc([1.0, 2.0], [3.0, 4.0]) == 1.0
    assert auc([3.0, 4.0], [1.0, 2.0]) == 0.0


def test_the_auc_is_the_share_of_pairs_in_order():
    # (1, 2) and (1, 4) and (3, 4) in order, (3, 2) not
    assert auc([1.0, 3.0], [2.0, 4.0]) == 0.75


def test_an_auc_without_a_side_or_of_broken_scores_is_none():
    assert auc([], [1.0]) is None
    assert auc([1.0], []) is None
    assert auc([nan], [1.0]) is None
    assert auc([1.0], [inf]) is None


@settings(deadline=None, max_examples=50)
@given(SCORES, SCORES)
def test_swapping_forget_and_holdout_turns_the_auc_around(
    forget: list[float], holdout: list[float]
):
    one_way, other_way = auc(forget, holdout), auc(holdout, forget)
    assert one_way is not None
    assert other_way == pytest.approx(1 - one_way)


def test_privleak_is_the_relative_change_of_the_leak_in_percent():
    # ((1 - 0.75) - (1 - 0.5)) / (1 - 0.5) = -50 %: still memorised
    assert privleak(0.75, 0.5) == pytest.approx(-50.0)
    assert privleak(0.25, 0.5) == pytest.approx(50.0)
    assert privleak(0.5, 0.5) == 0.0


def test_privleak_against_an_oracle_that_leaks_everything_stays_finite():
    assert privleak(0.5, 1.0) == pytest.approx(100 * 0.5 / 1e-10)


def test_privleak_without_an_auc_is_none():
    assert privleak(0.75, None) is None
    assert privleak(None, 0.5) is None
