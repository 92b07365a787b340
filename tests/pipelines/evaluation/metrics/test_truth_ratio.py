"""The truth ratio and what is made of it, against numbers worked out by hand."""

from math import exp, log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.evaluation.metrics.truth_ratio import (
    forget_quality,
    forget_truth_ratio,
    retain_truth_ratio,
    truth_ratio,
)


def test_the_truth_ratio_averages_the_perturbed_losses_before_it_exponentiates():
    # exp(-(log 2 + log 8) / 2) = 1/4, over a correct answer of 1/2; a mean of probabilities would give 0.625
    assert truth_ratio(log(2), [log(2), log(8)]) == pytest.approx(0.5)


def test_an_impossible_correct_answer_gives_a_finite_ratio():
    assert truth_ratio(1e4, [0.0]) == pytest.approx(1e10)


def test_an_empty_list_of_perturbed_answers_is_a_programming_error():
    with pytest.raises(AssertionError):
        truth_ratio(1.0, [])


def test_the_forget_truth_ratio_treats_twice_and_half_alike():
    assert forget_truth_ratio([2.0]) == pytest.approx(0.5)
    assert forget_truth_ratio([0.5]) == pytest.approx(0.5)
    assert forget_truth_ratio([0.5, 4.0, 1.0]) == pytest.approx((0.5 + 0.25 + 1) / 3)


def test_the_forget_truth_ratio_keeps_its_epsilon_and_takes_a_ratio_of_zero():
    assert forget_truth_ratio([1.0]) == 1 / (1 + 1e-10)
    assert forget_truth_ratio([0.0]) == 0.0


def test_the_retain_truth_ratio_is_zero_where_the_perturbed_answer_is_likelier():
    assert retain_truth_ratio([0.25, 3.0]) == pytest.approx((0.75 + 0.0) / 2)


def test_the_forget_quality_without_an_oracle_is_none():
    assert forget_quality([0.1, 0.2], None) is None


def test_the_forget_quality_of_the_oracle_itself_is_one():
    assert forget_quality([0.1, 0.2, 0.3], [0.3, 0.1, 0.2]) == 1.0


def test_two_separate_groups_of_three_have_a_forget_quality_of_one_in_ten():
    # D = 1: 2 of the C(6, 3) = 20 arrangements are as extreme
    assert forget_quality([0.1, 0.2, 0.3], [1.1, 1.2, 1.3]) == pytest.approx(0.1)


@settings(deadline=None, max_examples=50)
@given(st.floats(0, 30), st.lists(st.floats(0, 30), min_size=1, max_size=5), st.floats(0.01, 5))
def test_making_the_perturbed_answers_harder_lowers_the_ratio_by_as_much(
    correct: float, perturbed: list[float], harder: float
):
    harder_ratio = truth_ratio(correct, np.array(perturbed) + harder)
    assert harder_ratio == pytest.approx(truth_ratio(correct, perturbed) * exp(-harder))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=10))
def test_both_means_lie_between_zero_and_one(ratios: list[float]):
    assert 0 <= forget_truth_ratio(ratios) <= 1
    assert 0 <= retain_truth_ratio(ratios) <= 1
