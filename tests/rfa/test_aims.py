"""Aims against a plain loop, and the coarsened prediction against whole distributions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rfa.aims import LIKELIEST, NEIGHBOURS, SHARPNESS, Prediction, neighbour_aims


@given(seed=st.integers(0, 99), unseen=st.integers(1, 20))
@settings(max_examples=20, deadline=None)
def test_an_aim_is_the_weighted_mean_of_the_nearest_tokens(seed: int, unseen: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    feature_ND = torch.randn(4, 6, generator=generator)
    unseen_MD = torch.randn(unseen, 6, generator=generator) + 3
    log_p_M = -torch.rand(unseen, generator=generator) * 10
    aim_N = neighbour_aims(feature_ND, unseen_MD, log_p_M)
    centre_D = unseen_MD.mean(0)
    for feature_D, aim in zip(feature_ND, aim_N, strict=True):
        cosines: list[tuple[float, float]] = []
        for other_D, log_p in zip(unseen_MD, log_p_M, strict=True):
            cosine = torch.cosine_similarity(feature_D - centre_D, other_D - centre_D, dim=0)
            cosines.append((float(cosine), float(log_p)))
        nearest = sorted(cosines, reverse=True)[:NEIGHBOURS]
        weights = torch.tensor([cosine for cosine, _ in nearest]).mul(SHARPNESS).softmax(0)
        expected = sum(float(w) * log_p for w, (_, log_p) in zip(weights, nearest, strict=True))
        assert float(aim) == pytest.approx(expected, abs=1e-4)


def test_a_token_whose_twin_was_never_seen_aims_at_what_the_twin_has() -> None:
    unseen_MD = torch.eye(8) * 5
    log_p_M = torch.arange(8.0).neg()
    aim_N = neighbour_aims(unseen_MD[3:4], unseen_MD, log_p_M)
    assert float(aim_N) == pytest.approx(-3.0, abs=0.01)


def test_no_never_seen_tokens_are_an_error() -> None:
    with pytest.raises(ValueError, match="holdout set has no answer tokens"):
        neighbour_aims(torch.ones(1, 4), torch.empty(0, 4), torch.empty(0))


@given(seed=st.integers(0, 99), width=st.integers(2, 3 * LIKELIEST))
@settings(max_examples=20, deadline=None)
def test_a_coarsened_divergence_is_a_lower_bound(seed: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_p_NV, log_q_NV = torch.randn(2, 5, width, generator=generator).mul(2).log_softmax(-1)
    exact_N = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)
    coarse_N = Prediction.of(log_p_NV).divergence(log_q_NV)
    assert bool((coarse_N <= exact_N + 1e-4).all())
    if width <= LIKELIEST:
        torch.testing.assert_close(coarse_N, exact_N, rtol=1e-3, atol=1e-4)


def test_a_prediction_does_not_diverge_from_itself() -> None:
    # A held token is nearly certain: what is left for all others is rounding.
    certain_NV = (torch.eye(3, 200) * 40).log_softmax(-1)
    assert float(Prediction.of(certain_NV).divergence(certain_NV).abs().max()) < 1e-6
