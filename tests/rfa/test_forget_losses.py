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
    assert value("descent") == pytest.approx([-math.log(p) for p in (0.5, 0.7, 0.4)])
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


def test_dpo_by_hand() -> None:
    # The second row's last token is its refusal. The first row has an answer alone.
    given = answers()._replace(refusal_N=torch.tensor([False, False, True]))
    ratios = [(0.5 / 0.2) ** -1, (0.7 / 0.7) ** -1 * (0.4 / 0.1)]
    for beta in (0.1, 1.0):
        expected = [2 / beta * math.log(1 + ratio**-beta) for ratio in ratios]
        assert FORGET_LOSSES["dpo"](given, {"beta": beta}).tolist() == pytest.approx(
            expected, rel=1e-5
        )


def test_simnpo_by_hand() -> None:
    # The geometric mean of the answer tokens' probabilities, row by row.
    for beta, gamma in ((2.5, 0.0), (1.0, 0.5)):
        means = [0.5**beta, (0.7 * 0.4) ** (beta / 2)]
        expected = [2 / beta * math.log(1 + mean * math.exp(gamma)) for mean in means]
        assert value("simnpo", beta=beta, gamma=gamma) == pytest.approx(expected, rel=1e-5)


def test_weighted_ascents_by_hand() -> None:
    probabilities = (0.5, 0.7, 0.4)
    for beta in (1.0, 3.0):
        expected = [p**beta * math.log(p) for p in probabilities]
        assert value("wga", beta=beta) == pytest.approx(expected, rel=1e-5)
    expected = [p**5 * (1 - p) * math.log(p) for p in probabilities]
    assert value("satimp") == pytest.approx(expected, rel=1e-5)
    expected = [p**2 * (1 - p) ** 3 * math.log(p) for p in probabilities]
    assert value("satimp", beta1=2, beta2=3) == pytest.approx(expected, rel=1e-5)


def test_masc_by_hand() -> None:
    # With three tokens the rivals are both others: the margin is the log-odds.
    for rho, eta in ((0.7, 0.25), (0.5, 1.0)):
        bound = math.log(rho / (1 - rho)) - eta
        margins = [math.log(p / (1 - p)) for p in (0.5, 0.7, 0.4)]
        expected = [max(0.0, margin - bound) / eta for margin in margins]
        assert value("masc", rho=rho, eta=eta) == pytest.approx(expected, abs=1e-6)
    log_NV = torch.arange(20.0)[None].log_softmax(1)
    of_twenty = Answers(log_NV, torch.tensor([19]), torch.tensor([0]), torch.tensor([0]))
    rivals = sum(math.exp(rank) for rank in range(9, 19))
    expected_margin = 19 - math.log(rivals)
    found = float(FORGET_LOSSES["masc"](of_twenty, {"rho": 0.5, "eta": 1.0}))
    assert found == pytest.approx(expected_margin + 1, rel=1e-5)


def test_undial_and_ceu_are_torchs_cross_entropy_to_the_published_targets() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_NV, teacher_NV = 5 * torch.randn(2, 40, 97, generator=generator)
    label_N = torch.randint(97, (40,), generator=generator)
    index_N = torch.arange(40)
    given = Answers(logits_NV.log_softmax(1), label_N, index_N, index_N, teacher_NV.log_softmax(1))
    is_label_NV = F.one_hot(label_N, 97).bool()
    for beta in (1.0, 10.0):
        target_NV = (teacher_NV - beta * is_label_NV).softmax(1)
        expected_N = F.cross_entropy(logits_NV, target_NV, reduction="none")
        torch.testing.assert_close(FORGET_LOSSES["undial"](given, {"beta": beta}), expected_N)
    target_NV = logits_NV.masked_fill(is_label_NV, -math.inf).softmax(1)
    expected_N = F.cross_entropy(logits_NV, target_NV, reduction="none")
    torch.testing.assert_close(FORGET_LOSSES["ceu"](given), expected_N)


@pytest.mark.parametrize(
    ("name", "weight"),
    [("wga", lambda p: p), ("satimp", lambda p: p**5 * (1 - p)), ("ceu", lambda p: p)],
)
def test_weights_and_own_targets_carry_no_gradient(name: str, weight: Any) -> None:
    """At the label, log p of weight w has the gradient w (1 - p), and CE-U that of p - 0."""
    logits_NV = PROBABILITY_NV.log().requires_grad_()
    given = answers()._replace(log_NV=logits_NV.log_softmax(1))
    FORGET_LOSSES[name](given).sum().backward()
    assert logits_NV.grad is not None
    found = logits_NV.grad.gather(1, LABEL_N[:, None])[:, 0].tolist()
    for gradient, p in zip(found, (0.5, 0.7, 0.4), strict=True):
        scale = 1 if name == "ceu" else 1 - p
        assert gradient == pytest.approx(weight(p) * scale, rel=1e-4)


def test_the_target_of_ceu_is_constant() -> None:
    logits_NV = PROBABILITY_NV.log().requires_grad_()
    given = answers()._replace(log_NV=logits_NV.log_softmax(1))
    FORGET_LOSSES["ceu"](given).sum().backward()
    others_NV = PROBABILITY_NV.scatter(1, LABEL_N[:, None], 0.0)
    target_NV = others_NV / others_NV.sum(1, keepdim=True)
    assert logits_NV.grad is not None
    torch.testing.assert_close(logits_NV.grad, PROBABILITY_NV - target_NV)


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


ON_ANSWERS_ALONE = [name for name, loss in FORGET_LOSSES.items() if not loss.needs_refusals]


@pytest.mark.parametrize("name", ON_ANSWERS_ALONE)
def test_a_loss_does_not_depend_on_how_rows_are_split(
    name: str, build: Any, batch: UnlearnBatch
) -> None:
    """Also one whole run of each through the objective, with the teacher that the table says it needs."""
    # An untrained model's tokens lie below MASC's usual bound, where the loss is 0.
    parameters = {"rho": 1e-5} if name == "masc" else {}
    settings = Objective(output=name, output_parameters=parameters, weights=Weights(0, 0, 0, 0, 1))
    alignment = build(settings, warm=True)
    counts = batch.counts("all")
    together = float(alignment(batch).output.detach())
    forget = batch.forget_B.nonzero().flatten()
    apart = 0.0
    for rows in (forget[:1], forget[1:]):
        apart += float(alignment(batch.rows(rows), counts).output.detach())
    assert together != 0
    assert apart == pytest.approx(together, rel=1e-4)
