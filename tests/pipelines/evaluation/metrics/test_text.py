"""ROUGE-L on sentences whose longest common subsequence is counted by eye."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.evaluation.metrics.text import rouge_f1, rouge_recall

REFERENCE = "the cat sat on the mat"


def test_recall_is_the_share_of_the_reference_found_in_order():
    # "cat ... mat": 2 of the 6 words of the reference, 2 of the 4 generated
    assert rouge_recall("cat eats my mat", REFERENCE) == pytest.approx(2 / 6)


def test_f1_weighs_what_was_generated_too():
    # precision 2/4, recall 2/6, so 2 * 1/2 * 1/3 / (5/6) = 2/5
    assert rouge_f1("cat eats my mat", REFERENCE) == pytest.approx(0.4)


def test_a_rambling_answer_keeps_its_recall_and_loses_f1():
    rambling = f"{REFERENCE} and then it went out again"  # 6 of 12 words
    assert rouge_recall(rambling, REFERENCE) == 1.0
    assert rouge_f1(rambling, REFERENCE) == pytest.approx(2 / 3)


def test_the_order_of_words_counts():
    assert rouge_recall("b a", "a b") == pytest.approx(0.5)


def test_words_are_compared_by_their_stem_whatever_the_case():
    assert rouge_recall("Writing novels", "writes novel") == 1.0


def test_a_text_outside_ascii_scores_zero_even_against_itself():
    assert rouge_recall("東京 に 住む", "東京 に 住む") == 0.0


def test_an_empty_generation_scores_zero():
    assert rouge_recall("", REFERENCE) == 0.0
    assert rouge_f1("", REFERENCE) == 0.0


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.sampled_from("abcd"), min_size=1, max_size=8),
    st.lists(st.sampled_from("abcd"), max_size=8),
)
def test_f1_is_symmetric_and_a_continuation_never_lowers_recall(words: list[str], more: list[str]):
    reference, generated = " ".join(words), " ".join(more)
    assert rouge_f1(generated, reference) == pytest.approx(rouge_f1(reference, generated))
    assert rouge_recall(generated + " a", reference) >= rouge_recall(generated, reference)
