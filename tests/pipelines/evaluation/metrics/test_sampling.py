import pytest

from pipelines.evaluation.metrics.sampling import best_of_each


def test_of_several_answers_to_a_question_the_best_counts_and_of_questions_the_mean() -> None:
    assert best_of_each([0.1, 0.9, 0.3], samples=3) == 0.9
    assert best_of_each([0.1, 0.9, 0.3, 0.5, 0.2, 0.4], samples=3) == pytest.approx(0.7)


def test_of_one_answer_a_question_it_is_the_mean() -> None:
    assert best_of_each([0.2, 0.9, 0.1], samples=1) == pytest.approx(0.4)


def test_answers_are_as_many_as_the_questions_have_samples() -> None:
    with pytest.raises(ValueError, match="cannot reshape"):
        best_of_each([0.1, 0.9, 0.3], samples=2)
