"""Aims against a plain loop, and the coarsened prediction against whole distributions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rfa.aims import LIKELIEST, NEIGHBOURS, SHARPNESS, Neighbours, Prediction, Unseen


def aims(feature_ND: Tensor, unseen_MD: Tensor, log_p_M: Tensor) -> Tensor:
    """The labels' aims; nothing is asked of what the never-seen tokens predict."""
    nothing = Prediction.of(torch.zeros(len(unseen_MD), 3))
    unseen = Unseen(unseen_MD, log_p_M, nothing)
    return Neighbours.of(feature_ND, unseen_MD).log_p(unseen)


@given(seed=st.integers(0, 99), unseen=st.integers(1, 20))
@settings(max_examples=20, deadline=None)
def test_an_aim_is_the_weighted_mean_of_the_nearest_tokens(seed: int, unseen: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    feature_ND = torch.randn(4, 6, generator=generator)
    unseen_MD = torch.randn(unseen, 6, generator=generator) + 3
    log_p_M = -torch.rand(unseen, generator=generator) * 10
    aim_N = aims(feature_ND, unseen_MD, log_p_M)
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
    aim_N = aims(unseen_MD[3:4], unseen_MD, log_p_M)
    assert float(aim_N) == pytest.approx(-3.0, abs=0.01)


def test_no_never_seen_tokens_are_an_error() -> None:
    with pytest.raises(ValueError, match="holdout set has no answer tokens"):
        Neighbours.of(torch.ones(1, 4), torch.empty(0, 4))


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


@given(seed=st.integers(0, 99), vocabulary=st.integers(3, 2 * LIKELIEST))
@settings(max_examples=20, deadline=None)
def test_what_should_rise_is_the_neighbours_mean_without_the_label(
    seed: int, vocabulary: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_p_MV = torch.randn(4, vocabulary, generator=generator).mul(2).log_softmax(-1)
    unseen = Unseen(torch.zeros(4, 2), torch.zeros(4), Prediction.of(log_p_MV))
    neighbours = Neighbours(torch.tensor([[0, 1], [3, 2]]), torch.tensor([[0.7, 0.3], [0.5, 0.5]]))
    label_N = torch.tensor([1, vocabulary - 1])
    found = neighbours.others(unseen, label_N, vocabulary)
    for row, (index_J, weight_J) in enumerate(zip(*neighbours, strict=True)):
        p_V = (weight_J[:, None] * log_p_MV[index_J].exp()).sum(0)
        p_V[label_N[row]] = 0
        p_V /= p_V.sum()
        label = label_N[row]
        assert not (found.token_NL[row][found.log_p_NL[row] > -15] == label).any()
        expected_L = p_V[found.token_NL[row]]
        # What a neighbour's coarsened prediction leaves out is missing here, too.
        missing = float((1 - Prediction.of(log_p_MV).log_p_NL.exp().sum(-1)).max())
        atol = 1e-5 + missing
        torch.testing.assert_close(found.log_p_NL[row].exp(), expected_L, rtol=1e-3, atol=atol)
        if vocabulary <= LIKELIEST:
            q_V = log_p_MV[row].clone()
            others_V = (q_V - torch.log1p(-q_V[label].exp()))[None]
            exact = (p_V * (p_V.clamp(min=1e-12).log() - others_V[0])).sum()
            one = Prediction(*(column[row : row + 1] for column in found))
            assert float(one.divergence(others_V)) == pytest.approx(float(exact), abs=1e-3)


def test_no_tokens_have_no_neighbours_law() -> None:
    unseen = Unseen(torch.zeros(4, 2), torch.zeros(4), Prediction.of(torch.zeros(4, 9)))
    none = Neighbours(torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    others = none.others(unseen, torch.zeros(0, dtype=torch.long), 9)
    assert others.divergence(torch.zeros(0, 9)).shape == (0,)
