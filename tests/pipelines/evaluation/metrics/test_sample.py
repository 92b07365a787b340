"""The record of a row: what one forward pass gives, and that it carries no text."""

import pickle
import zlib

import numpy as np
import pytest

from pipelines.evaluation.metrics import Sample, TokenStatistics, sample_scores


def statistics(log_probability: list[float], is_argmax: list[bool]) -> TokenStatistics:
    """Every token with mu_t = -1 and var_t = 4."""
    num_tokens = len(log_probability)
    return TokenStatistics(
        np.array(log_probability),
        np.array(is_argmax),
        np.full(num_tokens, -1.0),
        np.full(num_tokens, 4.0),
    )


def test_only_the_loss_and_what_is_made_of_it_count_eos() -> None:
    scores = sample_scores(statistics([-1.0, -3.0, -8.0], [False, True, False]), "an answer")
    expected = {
        "loss": 4.0,
        "tokens": 3,
        "exact_memorization": 0.5,
        "extraction_strength": 0.5,
        "zlib_score": 4.0 / len(zlib.compress(b"an answer")),
        "min_k": 3.0,
        "min_k_plus_plus": 1.0,
    }
    assert {name: scores[name] for name in expected} == expected


def test_every_end_of_a_conversation_is_left_out() -> None:
    # Two answers of one token, each with its end; the ends are the least likely.
    numbers = statistics([-1.0, -9.0, -2.0, -8.0], [True, False, True, False])
    scores = sample_scores(numbers, "a\nb", ends=[1, 3])
    assert (scores["loss"], scores["tokens"]) == (5.0, 4)
    assert (scores["min_k"], scores["exact_memorization"]) == (2.0, 1.0)


def test_an_answer_of_eos_alone_keeps_its_loss_and_has_no_other_score() -> None:
    scores = sample_scores(statistics([-2.0], [True]), "")
    assert (scores["loss"], scores["tokens"]) == (2.0, 1)
    assert sorted(name for name, value in scores.items() if value is None) == [
        "exact_memorization",
        "extraction_strength",
        "min_k",
        "min_k_plus_plus",
        "outputs",
    ]


def test_an_answer_without_a_token_is_refused() -> None:
    with pytest.raises(ValueError, match="no labelled token"):
        sample_scores(statistics([], []), "")


def test_the_scores_of_a_pass_are_numbers_of_a_sample() -> None:
    scores = sample_scores(statistics([-1.0, -3.0], [True, True]), "a")
    sample = Sample(set_name="forget", rouge=0.5, **scores)
    assert [sample[name] for name in ("loss", "tokens", "min_k", "rouge")] == [2.0, 2, 1.0, 0.5]


def test_a_sample_pickles() -> None:
    sample = Sample(set_name="holdout", loss=1.0, perturbed_losses=(2.0, 3.0))
    assert pickle.loads(pickle.dumps(sample)) == sample


def test_an_unknown_set_is_refused_with_the_choices() -> None:
    with pytest.raises(
        ValueError, match="'forgot' is not a set; the sets are: forget, retain, utility"
    ):
        Sample(set_name="forgot")


def test_the_set_name_is_the_only_text_in_a_sample() -> None:
    with pytest.raises(ValueError, match="answer: a text, allowed: numbers alone"):
        Sample(set_name="forget", loss=1.0, answer="Nobody.")
