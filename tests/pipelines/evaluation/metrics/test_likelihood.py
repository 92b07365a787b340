"""Loss, probability, perplexity and the statistics of a forward pass, against numbers worked out by hand."""

from math import exp, inf, log, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.evaluation.metrics import forward
from pipelines.evaluation.metrics.forward import token_statistics
from pipelines.evaluation.metrics.likelihood import Answer, entropy, loss, perplexity, probability

LOSSES = st.floats(min_value=0, max_value=50)


def test_a_uniform_model_scores_log_vocabulary():
    statistics = token_statistics(torch.zeros(3, 50), torch.tensor([0, 7, 49]))
    assert loss(statistics.log_probability) == pytest.approx(log(50), rel=1e-6)
    assert statistics.mean == pytest.approx([-log(50)] * 3, rel=1e-6)
    assert statistics.variance == pytest.approx([0.0] * 3, abs=1e-10)


def test_the_moments_of_three_quarters_and_one_quarter_are_worked_out_by_hand():
    statistics = token_statistics(torch.tensor([[0.75, 0.25]]).log(), torch.tensor([1]))
    assert statistics.log_probability == pytest.approx([log(0.25)], rel=1e-6)
    assert statistics.mean == pytest.approx([0.75 * log(0.75) + 0.25 * log(0.25)], rel=1e-6)
    # log p is log 3 apart with odds 3 : 1, so var = 3/4 * 1/4 * log(3)^2
    assert statistics.variance == pytest.approx([3 / 16 * log(3) ** 2], rel=1e-5)


def test_only_the_label_with_the_largest_logit_is_the_first_choice():
    logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]])
    assert token_statistics(logits, torch.tensor([1, 2])).is_argmax.tolist() == [True, False]


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[10_000.0, 10_000.0 - log(3)]])
    assert token_statistics(logits, torch.tensor([0])).log_probability == pytest.approx(
        [log(0.75)], abs=1e-3
    )


def test_a_token_the_model_forbids_leaves_the_moments_finite():
    statistics = token_statistics(torch.tensor([[0.0, 0.0, -inf]] * 2), torch.tensor([0, 2]))
    assert statistics.log_probability == pytest.approx([-log(2), -inf])
    assert statistics.mean == pytest.approx([-log(2)] * 2)
    assert statistics.variance == pytest.approx([0.0] * 2, abs=1e-10)


def test_the_variance_of_a_nearly_uniform_large_vocabulary_does_not_cancel():
    logits = 1e-3 * torch.randn(4, 50_000, generator=torch.Generator().manual_seed(0))
    log_p = logits.double().log_softmax(-1)
    expected = ((log_p.exp() * log_p**2).sum(-1) - (log_p.exp() * log_p).sum(-1) ** 2).numpy()
    assert token_statistics(logits, torch.zeros(4, dtype=torch.long)).variance == pytest.approx(
        expected, rel=1e-2
    )


def test_half_precision_logits_are_read_in_float32():
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.tensor([1, 2, 3, 4])
    for half, full in zip(
        token_statistics(logits, labels), token_statistics(logits.float(), labels), strict=True
    ):
        np.testing.assert_array_equal(half, full)


def test_the_size_of_a_chunk_does_not_change_the_statistics(monkeypatch: pytest.MonkeyPatch):
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(7)
    whole = token_statistics(logits, labels)
    monkeypatch.setattr(forward, "ROWS_PER_CHUNK", 3)
    for chunked, expected in zip(token_statistics(logits, labels), whole, strict=True):
        np.testing.assert_allclose(chunked, expected, rtol=1e-6)


def test_a_batch_without_a_labelled_token_has_empty_statistics():
    statistics = token_statistics(torch.zeros(0, 5), torch.zeros(0, dtype=torch.long))
    assert [len(array) for array in statistics] == [0, 0, 0, 0]


def test_a_flat_batch_is_cut_back_into_its_rows():
    flat = token_statistics(torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0]))
    first, empty, last = flat.split([2, 0, 4])
    assert first.log_probability.tolist() == flat.log_probability[:2].tolist()
    assert len(empty.mean) == 0
    assert last.variance.tolist() == flat.variance[2:].tolist()
    assert last.without_eos().is_argmax.tolist() == flat.is_argmax[2:5].tolist()


def test_lengths_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match="add up to 5, but there are 6 tokens"):
        token_statistics(torch.zeros(6, 5), torch.zeros(6, dtype=torch.long)).split([2, 3])


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.floats(min_value=-20, max_value=20), min_size=2, max_size=8), st.floats(-100, 100)
)
def test_adding_a_constant_to_the_logits_changes_nothing(row: list[float], constant: float):
    logits = torch.tensor([row], dtype=torch.float64)
    label = torch.tensor([len(row) - 1])
    plain, shifted = token_statistics(logits, label), token_statistics(logits + constant, label)
    assert shifted.log_probability == pytest.approx(plain.log_probability, abs=1e-3)
    assert shifted.mean == pytest.approx(plain.mean, abs=1e-3)


def test_the_loss_is_the_mean_over_tokens_not_the_sum():
    assert loss(np.log([0.5, 0.125])) == pytest.approx(2 * log(2))


def test_an_answer_without_tokens_is_refused():
    with pytest.raises(ValueError, match="no labelled token"):
        loss(np.array([]))


def test_the_entropy_of_an_answer_is_the_mean_over_its_tokens() -> None:
    # A uniform distribution over two words, then one that is certain: log 2 and 0.
    logits = torch.tensor([[0.0, 0.0], [0.0, -inf]])
    answer = Answer(token_statistics(logits, torch.tensor([0, 0])), "a")
    assert entropy(answer) == pytest.approx(log(2) / 2)


def test_probability_is_the_mean_of_probabilities_not_of_losses():
    assert probability([log(2), log(4)]) == pytest.approx((0.5 + 0.25) / 2)


def test_perplexity_weighs_a_sample_by_its_tokens():
    # (3 log 2 + 1 log 8) / 4 = 1.5 log 2
    assert perplexity([log(2), log(8)], [3, 1]) == pytest.approx(2 * sqrt(2))


def test_a_hopeless_perplexity_is_infinite():
    assert perplexity([1e4], [1]) == inf


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(LOSSES, st.integers(1, 100)), min_size=1, max_size=10))
def test_perplexity_lies_between_the_best_and_the_worst_sample(samples: list[tuple[float, int]]):
    losses, tokens = zip(*samples, strict=True)
    assert (
        exp(min(losses)) * (1 - 1e-9) <= perplexity(losses, tokens) <= exp(max(losses)) * (1 + 1e-9)
    )


@settings(deadline=None, max_examples=50)
@given(st.lists(LOSSES, min_size=1, max_size=10))
def test_probability_lies_between_the_worst_and_the_best_sample(losses: list[float]):
    assert exp(-max(losses)) * (1 - 1e-9) <= probability(losses) <= exp(-min(losses)) * (1 + 1e-9)
