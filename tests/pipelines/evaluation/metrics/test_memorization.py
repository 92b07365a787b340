"""Exact memorization, extraction strength and fact recall on answers short enough to count by eye."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.evaluation.metrics.memorization import (
    exact_memorization,
    extraction_strength,
    fact_recall,
)


def first_choices(pattern: str) -> np.ndarray:
    """'x' a token the model would have chosen, '.' another."""
    return np.array([character == "x" for character in pattern], dtype=np.bool_)


@pytest.mark.parametrize(("pattern", "expected"), [("xxxx", 1.0), ("x.x.", 0.5), ("....", 0.0)])
def test_exact_memorization_is_the_share_of_first_choices(pattern: str, expected: float):
    assert exact_memorization(first_choices(pattern)) == expected


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("xxxx", 1.0),  # no prefix is needed
        (".xxx", 0.75),
        ("x.xx", 0.5),  # what is right before the last miss does not count
        ("xx.x", 0.25),
        ("xxx.", 0.25),  # the floor 1/N, although nothing is extracted
        ("....", 0.25),
        (".", 1.0),  # the floor of one token
    ],
)
def test_extraction_strength_is_the_share_completed_after_the_shortest_prefix(
    pattern: str, expected: float
):
    assert extraction_strength(first_choices(pattern)) == expected


def test_an_answer_of_eos_alone_has_no_memorization_score():
    assert exact_memorization(first_choices("")) is None
    assert extraction_strength(first_choices("")) is None


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("xxxxx", 1.0),
        ("..xx.", 1.0),  # the words around the fact do not count
        ("xx.xx", 0.0),  # half a fact is none
        ("xx..x", 0.0),
    ],
)
def test_a_fact_is_recalled_when_each_of_its_tokens_is_the_first_choice(
    pattern: str, expected: float
):
    assert fact_recall(first_choices(pattern), first_choices("..xx.")) == expected


def test_an_answer_without_a_fact_has_no_fact_recall():
    assert fact_recall(first_choices("xxx"), first_choices("...")) is None
    assert fact_recall(first_choices(""), first_choices("")) is None


@settings(deadline=None, max_examples=50)
@given(st.text(alphabet="x.", min_size=1, max_size=12))
def test_extraction_strength_agrees_with_trying_every_prefix(pattern: str):
    num_tokens = len(pattern)
    prefixes = [k for k in range(num_tokens) if set(pattern[k:]) == {"x"}]
    expected = 1 - prefixes[0] / num_tokens if prefixes else 1 / num_tokens
    assert extraction_strength(first_choices(pattern)) == pytest.approx(expected)
