"""The token loss and its Gauss-Newton matrix against automatic differentiation."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.functional import hvp

from rfa.aims import Prediction
from rfa.batch import Row, collate
from rfa.token_loss import HELD_WEIGHT, MOST_GAP, Answers, Standing, curved, sums_of, terms

VOCABULARY = 12


def answers_of(seed: int, gap: float) -> tuple[Answers, Tensor]:
    """Four answer tokens, two of them pushed, whose labels' log-odds are `gap` from their aims."""
    generator = torch.Generator().manual_seed(seed)
    batch = collate([], [Row([1, 2, 3, 4, 5, 6], 2)], 0)
    logits_NV = torch.randn(4, VOCABULARY, generator=generator, dtype=torch.float64)
    log_p_NV = logits_NV.log_softmax(-1)
    pushed_N = torch.tensor([True, False, True, False])
    label_N1 = batch.expected(batch.answer_BT)[:, None]
    p_N = log_p_NV.gather(-1, label_N1)[:, 0].exp()
    aim_N = torch.logit(p_N).sub(gap).sigmoid().log()
    others_NV = torch.randn(4, VOCABULARY, generator=generator, dtype=torch.float64)
    others_NV = others_NV.scatter(-1, label_N1, -50.0).log_softmax(-1)
    others = Prediction.of(others_NV[pushed_N])
    # At the original itself, where the divergence's matrix is the Fisher matrix alone.
    held = Prediction.of(log_p_NV[~pushed_N])
    return Answers(batch, aim_N, pushed_N, others, held), logits_NV


@given(seed=st.integers(0, 999))
@settings(max_examples=20, deadline=None)
def test_the_matrix_is_that_of_the_loss_where_the_aims_are_met(seed: int) -> None:
    answers, logits_NV = answers_of(seed, gap=0.0)

    def loss(logits_NV: Tensor) -> Tensor:
        return terms(answers, logits_NV.log_softmax(-1)).total()

    change_NV = torch.randn(
        4, VOCABULARY, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64
    )
    # The others' divergence has this matrix, too, wherever it should go.
    _, expected_NV = hvp(loss, logits_NV, change_NV)
    log_p_NV = logits_NV.log_softmax(-1)
    of_log_p_NV = change_NV - (log_p_NV.exp() * change_NV).sum(-1, keepdim=True)
    found_NV = curved(answers, log_p_NV, of_log_p_NV)
    torch.testing.assert_close(found_NV, expected_NV, rtol=1e-4, atol=1e-5)


@given(seed=st.integers(0, 999), gap=st.floats(-9, 9))
@settings(max_examples=20, deadline=None)
def test_the_matrix_is_symmetric_never_negative_and_of_logits(seed: int, gap: float) -> None:
    answers, logits_NV = answers_of(seed, gap)
    log_p_NV = logits_NV.log_softmax(-1)
    generator = torch.Generator().manual_seed(seed + 2)
    one_NV, other_NV = torch.randn(2, 4, VOCABULARY, generator=generator, dtype=torch.float64)
    of_one_NV, of_other_NV = (curved(answers, log_p_NV, part) for part in (one_NV, other_NV))
    torch.testing.assert_close((one_NV * of_other_NV).sum(), (other_NV * of_one_NV).sum())
    assert float((one_NV * of_one_NV).sum()) >= 0
    torch.testing.assert_close(of_one_NV.sum(-1), torch.zeros(4, dtype=torch.float64))


def test_beyond_the_largest_gap_a_token_pushes_no_harder_and_curves_less() -> None:
    change_NV = torch.zeros(4, VOCABULARY, dtype=torch.float64)
    change_NV[0, 3] = 1.0  # the first token's label
    near, far = (answers_of(0, gap) for gap in (MOST_GAP, 4 * MOST_GAP))
    curvatures: list[float] = []
    for answers, logits_NV in (near, far):
        image_NV = curved(answers, logits_NV.log_softmax(-1), change_NV)
        curvatures.append(float(image_NV[0, 3]))
    # What is left of both is the spread of the other tokens' prediction, which has no label.
    assert curvatures[0] / curvatures[1] > 3.9


def test_a_standing_is_the_mean_over_batches() -> None:
    parts = [answers_of(seed, gap=2.0) for seed in (0, 1)]
    sums = [sums_of(answers, logits_NV.log_softmax(-1)) for answers, logits_NV in parts]
    standing = Standing.of(sums[0] + sums[1])
    assert standing.away == 4
    alone = [Standing.of(one) for one in sums]
    for name in ("log_p", "aim", "divergence", "loss"):
        mean = sum(getattr(one, name) for one in alone) / 2
        torch.testing.assert_close(getattr(standing, name), mean)
    assert HELD_WEIGHT > 0 and standing.divergence < 1e-6
