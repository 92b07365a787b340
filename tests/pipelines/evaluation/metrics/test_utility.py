"""The harmonic mean that is the model utility."""

import pytest

from pipelines.evaluation.metrics.utility import model_utility


def test_the_utility_of_a_half_and_a_quarter_is_a_third():
    assert model_utility([0.5, 0.25]) == pytest.approx(1 / 3)


def test_one_collapsed_part_takes_the_utility_to_zero():
    assert model_utility([1.0, 1.0, 0.0]) == 0.0


def test_a_missing_part_leaves_no_utility():
    assert model_utility([0.5, None]) is None
    assert model_utility([]) is None
