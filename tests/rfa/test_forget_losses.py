"""Every forget loss against its published formula, computed by hand on probabilities."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rfa.batch import UnlearnBatch
from rfa.forget_losses import FORGET_LOSSES, Answers
from rfa.settings import Objective, Weights

# Three tokens of two rows, the first row has one.
PROBABILITY_NV = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.3, 0.3, 0.4]])
TEACHER_NV = torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.2, 0.7], [0.6, 0.3, 0.1]])
LABEL_N = torch.tensor([0, 2, 2])


def answers(probability_NV: Tensor = PROBABILITY_NV) -> Answers:
    return Answers(
        log_NV=probability_NV.log(),
        label_N=LABEL_N,
        index_N=torch.tensor([0, 1, 1]),
        number_N=torch.tensor([7, 3, 3]),
        teacher_NV=TEACHER_NV.log(),
    )


def value(name: str, **parameters: float) -> list[float]:
    return FORGET_LOSSES[name](answers(), parameters).tolist()


def test_losses_per_token_by_hand() -> None:
    assert value("ascent") == pytest.approx([math.log(p) for p in (0.5, 0.7, 0.4)])
    assert value("unlikelihood") == pytest.approx([-math.log(q) for q in (0.5, 0.3, 0.6)])
    products = [0.5 * 0.25**2, 0.1 * 0.2 * 0.7, 0.3 * 0.3 * 0.4]
    assert value("bad_teacher") == pytest.approx(
        [-math.log(p * 27) / 3 for p in products], abs=1e-6
    )
    kl_NV = F.kl_div(PROBABILITY_NV.log(), TEACHER_NV, reduction="none")
    assert value("scrub") == pytest.approx((-kl_NV.sum(1)).tolist(), abs=1e-6)


def test_npo_by_hand() -> None:
    # Ratios of the answers' probabilities to the base model's: a row's is the product over its tokens.
    ratios = [0.5 / 0.2, (0.7 / 0.7) * (0.4 / 0.1)]
    for beta in (0.1, 1.0, 3.0):
        expected = [2 / beta * math.log(1 + ratio**beta) for ratio in ratios]
        assert value("npo", beta=beta) == pytest.approx(expected, rel=1e-5)
    assert value("npo") == value("npo", beta=0.1)


def test_simnpo_by_hand() -> None:
    # The geometric mean of the answer tokens' probabilities, row by row.
    for beta, gamma in ((2.5, 0.0), (1.0, 0.5)):
        means = [0.5**beta, (0.7 * 0.4) ** (beta / 2)]
        expected = [2 / beta * math.log(1 + mean * math.exp(gamma)) for mean in means]
        assert value("simnpo", beta=beta, gamma=gamma) == pytest.approx(expected, rel=1e-5)


def test_unlikelihood_keeps_its_gradient_where_the_answer_is_certain() -> None:
    logits_NV = torch.tensor([[30.0, 0.0, 0.0]], requires_grad=True)
    certain = answers()._replace(log_NV=logits_NV.log_softmax(1), label_N=torch.tensor([0]))
    loss_N = FORGET_LOSSES["unlikelihood"](certain)
    assert float(loss_N.detach()) == pytest.approx(30 - math.log(2), rel=1e-5)
    loss_N.sum().backward()
    assert logits_NV.grad is not None
    assert float(logits_NV.grad[0, 0]) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_a_random_label_is_never_the_right_one(classes: int) -> None:
    number_N = torch.arange(40)
    label_N = number_N % classes
    log_NV = torch.eye(classes).log_softmax(1)[label_N]
    loss_N = FORGET_LOSSES["random_label"](Answers(log_NV, label_N, number_N, number_N))
    assert float(loss_N.min()) > float(-log_NV.max())


@pytest.mark.parametrize("name", FORGET_LOSSES)
def test_a_loss_does_not_depend_on_how_rows_are_split(
    name: str, build: Any, batch: UnlearnBatch
) -> None:
    """Also one whole run of each through the objective, with the teacher that the table says it needs."""
    alignment = build(Objective(output=name, weights=Weights(0, 0, 0, 0, 1)), warm=True)
    counts = batch.counts("all")
    together = float(alignment(batch).output.detach())
    forget = batch.forget_B.nonzero().flatten()
    apart = 0.0
    for rows in (forget[:1], forget[1:]):
        apart += float(alignment(batch.rows(rows), counts).output.detach())
    assert together != 0
    assert apart == pytest.approx(together, rel=1e-4)
