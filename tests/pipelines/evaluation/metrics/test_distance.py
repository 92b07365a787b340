"""Distances between two models' next-token distributions, against numbers worked out by hand."""

from math import log

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.evaluation.metrics import forward
from pipelines.evaluation.metrics.distance import MARGIN, parts_of_divergence
from pipelines.evaluation.metrics.forward import token_distances


def test_three_quarters_against_a_half_are_worked_out_by_hand() -> None:
    reference, model = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    distances = token_distances(reference, model, torch.tensor([1]))
    assert distances.divergence == pytest.approx([0.75 * log(1.5) + 0.25 * log(0.5)], rel=1e-6)
    assert distances.surplus == pytest.approx([log(2)], rel=1e-6)
    assert distances.reference == pytest.approx([log(0.25)], rel=1e-6)


def test_a_distance_is_not_symmetric_the_oracle_comes_first() -> None:
    sure, unsure = torch.tensor([[0.999, 0.001]]).log(), torch.tensor([[0.5, 0.5]]).log()
    label = torch.tensor([0])
    missed = token_distances(unsure, sure, label).divergence
    assert missed > 3 * token_distances(sure, unsure, label).divergence


def test_a_token_that_the_model_rules_out_gives_a_finite_distance() -> None:
    reference = torch.tensor([[0.0, 0.0]])
    distances = token_distances(reference, torch.tensor([[0.0, -np.inf]]), torch.tensor([1]))
    assert np.isfinite(distances.divergence).all() and np.isfinite(distances.surplus).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), tokens=st.integers(1, 7))
def test_distances_are_torchs_own_in_any_chunks(seed: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    reference, model = (3 * torch.randn(tokens, 11, generator=generator) for _ in range(2))
    labels = torch.randint(11, (tokens,), generator=generator)
    expected = torch.nn.functional.kl_div(
        model.log_softmax(-1), reference.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "ROWS_PER_CHUNK", 2)
        distances = token_distances(reference, model, labels)
    assert distances.divergence == pytest.approx(expected.numpy(), rel=1e-4, abs=1e-6)
    assert token_distances(model, model, labels).divergence.max() == 0
    of_reference = reference.log_softmax(-1)[torch.arange(tokens), labels]
    assert distances.reference == pytest.approx(of_reference.numpy(), rel=1e-4, abs=1e-6)
    rows = distances.split([1, tokens - 1])
    for whole, *parts in zip(distances, *rows, strict=True):
        assert np.concatenate(parts).tolist() == whole.tolist()


def test_models_of_other_vocabularies_are_refused() -> None:
    with pytest.raises(ValueError, match="12 entries, the reference's 11"):
        token_distances(torch.zeros(1, 11), torch.zeros(1, 12), torch.tensor([0]))


def test_two_wrongs_that_cancel_in_the_mean_do_not_cancel_in_the_distance() -> None:
    surplus = np.array([3.0, -3.0, MARGIN, 0.0])
    parts = parts_of_divergence(np.array([2.0, 1.0, 0.4, 0.2]), surplus)
    assert surplus.sum() == pytest.approx(MARGIN)
    assert parts == pytest.approx({"distance": 0.9, "distance_above": 0.5, "distance_below": 0.25})


def test_an_answer_without_tokens_has_no_distance() -> None:
    with pytest.raises(ValueError, match="no labelled token"):
        parts_of_divergence(np.array([]), np.array([]))
